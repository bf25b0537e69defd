"""Heads as they are seen: of browsers, tools, balancers and servers, and of those that mean harm.

What is ordinary is what the scanner of ``_fastpath`` takes; everything else, harmless or not, is
left to h11.
"""

from __future__ import annotations


def head(*lines: str) -> bytes:
    """Return a head of such lines."""
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def _get(*lines: str) -> bytes:
    return head("GET / HTTP/1.1", "Host: app.test", *lines)


def _post(*lines: str) -> bytes:
    return head("POST / HTTP/1.1", "Host: app.test", *lines)


def _ok(*lines: str) -> bytes:
    return head("HTTP/1.1 200 OK", *lines)


_CHROME = (
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/126.0.0.0 Safari/537.36"
)
_HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"

ORDINARY_REQUESTS = {
    "wrk": head("GET / HTTP/1.1", "Host: 127.0.0.1:8080"),
    "wrk that sends": head("POST /up HTTP/1.1", "Host: a:80", "Content-Length: 4") + b"body",
    "curl": head("GET /x?y&z HTTP/1.1", "Host: app.test", "User-Agent: curl/8.5.0", "Accept: */*"),
    "curl -I": head("HEAD / HTTP/1.1", "Host: app.test", "User-Agent: curl/8.5.0", "Accept: */*"),
    "curl -d": head(
        *("POST /login HTTP/1.1", "Host: app.test:8080", "User-Agent: curl/8.5.0"),
        *("Accept: */*", "Content-Length: 7", "Content-Type: application/x-www-form-urlencoded"),
    )
    + b"a=b&c=d",
    "curl -T -": head(
        *("PUT /file%20name.txt HTTP/1.1", "Host: app.test", "User-Agent: curl/7.88.1"),
        *("Accept: */*", "Transfer-Encoding: chunked"),
    )
    + b"4\r\nbody\r\n0\r\n\r\n",
    "Chrome": head(
        *("GET /posts/1?page=2 HTTP/1.1", "Host: www.example.com", "Connection: keep-alive"),
        'sec-ch-ua: "Not/A)Brand";v="8", "Chromium";v="126", "Google Chrome";v="126"',
        *("sec-ch-ua-mobile: ?0", 'sec-ch-ua-platform: "Linux"', "Upgrade-Insecure-Requests: 1"),
        *(f"User-Agent: {_CHROME}", f"Accept: {_HTML}", "Sec-Fetch-Site: same-origin"),
        *("Sec-Fetch-Mode: navigate", "Sec-Fetch-User: ?1", "Sec-Fetch-Dest: document"),
        *("Referer: https://www.example.com/posts", "Accept-Encoding: gzip, deflate, br, zstd"),
        *("Accept-Language: de-DE,de;q=0.9,en;q=0.8", "Cookie: _session=a%2Bb--c; theme=dark"),
        *('If-None-Match: W/"5d41402a"', "If-Modified-Since: Tue, 02 Jan 2024 10:00:00 GMT"),
    ),
    "Firefox": head(
        *("GET /search?q=%C3%BC%20x HTTP/1.1", "Host: localhost:3000"),
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:127.0) Gecko/20100101 Firefox/127.0",
        *(f"Accept: {_HTML}", "Accept-Language: en-US,en;q=0.5", "DNT: 1", "Sec-GPC: 1"),
        *("Accept-Encoding: gzip, deflate, br", "Connection: keep-alive", "Priority: u=0, i"),
    ),
    "Safari": head(
        *("POST /cart HTTP/1.1", "Host: shop.example.com", "Accept: */*"),
        *("Content-Type: application/json", "Origin: https://shop.example.com"),
        "User-Agent: Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) Version/17.5 Safari/605.1.15",
        *("X-CSRF-Token: abc==", "X-Requested-With: XMLHttpRequest", "Content-Length: 2"),
        *("Accept-Language: en-GB,en;q=0.9", "Connection: keep-alive"),
    )
    + b"{}",
    "a form with a file": head(
        *("POST /upload HTTP/1.1", "Host: app.test", "Content-Length: 123456"),
        "Content-Type: multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
    ),
    "a preflight": head(
        *("OPTIONS /api/items HTTP/1.1", "Host: api.example.com", "Origin: https://example.com"),
        *("Access-Control-Request-Method: PATCH", "Access-Control-Request-Headers: x-token"),
    ),
    "Go": head(
        *("GET /api/v1/items/42 HTTP/1.1", "Host: api.internal:9292"),
        *("User-Agent: Go-http-client/1.1", "Accept-Encoding: gzip"),
    ),
    "Python requests": head(
        *("DELETE /items/7 HTTP/1.1", "Host: api", "User-Agent: python-requests/2.32.3"),
        *("Accept-Encoding: gzip, deflate", "Accept: */*", "Connection: keep-alive"),
        "Content-Length: 0",
    ),
    "Ruby": head(
        *("PATCH /items/7 HTTP/1.1", "Accept-Encoding: gzip;q=1.0,deflate;q=0.6,identity;q=0.3"),
        *("Accept: application/json", "User-Agent: Ruby", "Content-Type: application/json"),
        *("Host: app.test", "Connection: close", "Content-Length: 2"),
    )
    + b"{}",
    "node": head(
        *("GET /a;b=c,d/@x/~y/(z)'!$&+=: HTTP/1.1", "host: app.test", "connection: keep-alive"),
        *("accept: */*", "accept-language: *", "sec-fetch-mode: cors", "user-agent: node"),
    ),
    "a probe": head("GET /up HTTP/1.1", "Host: 10.0.0.7", "User-Agent: kube-probe/1.30")
    + b"GET /next HTTP/1.1\r\nHost: 10.0.0.7\r\n\r\n",
    "behind nginx": head(
        *("GET / HTTP/1.1", "Host: app.test", "X-Real-IP: 192.0.2.1", "X-Forwarded-Proto: https"),
        *("X-Forwarded-For: 192.0.2.1, 198.51.100.7", "X-Forwarded-Host: app.test"),
        *("X-Request-ID: 7f1c", "X-Request-Start: t=1720000000000", "Connection: close"),
    ),
    "behind a cloud's balancer": head(
        *("GET / HTTP/1.1", "X-Forwarded-For: 203.0.113.9", "X-Forwarded-Proto: https"),
        *("X-Forwarded-Port: 443", "Host: app.test", "X-Amzn-Trace-Id: Root=1-67891233-abcdef"),
        *("CF-Connecting-IP: 203.0.113.9", 'CF-Visitor: {"scheme":"https"}', "Via: 1.1 google"),
    ),
    "an API": head(
        *("GET /me HTTP/1.1", "Host: api.example.com", "Authorization: Bearer a.b-c_d"),
        *("Accept: application/json", "traceparent: 00-4bf9-00f0-01", "Accept-Charset: utf-8"),
    ),
    "a range": _get("Range: bytes=0-1023", 'If-Range: "abc"', "Cache-Control: no-cache"),
    "Server-Sent Events": _get("Accept: text/event-stream", "Last-Event-ID: 41"),
    "no space after colons": _get("Accept:*/*", "User-Agent:x", "Connection:close"),
    "many spaces around values": _get("Accept:    a  b   ", "Content-Length:   0  "),
    "empty values": _get("Accept:", "X-Empty:   ", "Cookie: "),
    "Latin-1 in a value": _get("X-Name: J\xfcrgen \xff\x80\xa0"),
    "a name twice": _get("Cookie: a=b", "Cookie: c=d", "Accept: a", "accept: b"),
    "mixed case": head("GET / HTTP/1.1", "hOST: App.Test", "cONNECTION: Keep-Alive", "X-a: B"),
    "an odd query": head("GET /?a=%zz&b=%&c[]=<>{}|\\^`\"?/ HTTP/1.1", "Host: a"),
    "an odd path": head("GET //..//%2e%2F;/<>{}|\\^`\"[]*%00%0d%0A HTTP/1.1", "Host: a"),
    "an empty query": head("GET /? HTTP/1.1", "Host: a"),
    "a port without digits": head("GET / HTTP/1.1", "Host: a:"),
    "a final dot and underscores": head("GET / HTTP/1.1", "Host: my_app.test.:80"),
    "the longest host": head("GET / HTTP/1.1", f"Host: {'h' * 260}"),
    "100 fields": head("GET / HTTP/1.1", "Host: a", *(["a:"] * 99)),
    "a long head": head(f"GET /{'x' * 9000} HTTP/1.1", "Host: a", f"Cookie: {'c' * 30_000}"),
    "the longest length": _post(f"Content-Length: {'9' * 15}"),
    "names that are almost known": _get(
        *("Hosts: b", "Hos-: b", "T-: b", "Expects: b", "Content-Lengths: 5", "Xontent-Length: 7"),
        *("Transfer-Encodings: x", "Upgrade-: x", "X-Forwarded-For-: 1.2.3.4", "Connection-: x"),
        *("Forwarde-: x", "Keep-Aliv-: x", "Proxy-Connectio-: x", "X-Kamal-Targe-: x", "Age: x"),
        *("Proxy-Authenticat-: x", "Proxy-Authorizatio-: x", "X-Request-I-: x", "0: 1", "-: -"),
    ),
}  # fmt: skip

ODD_REQUESTS = {
    # Legitimate, and rare enough to be left to h11
    "an upgrade": _get("Connection: Upgrade", "Upgrade: websocket"),
    "Upgrade alone": _get("Upgrade: h2c"),
    "Expect": _post("Content-Length: 5", "Expect: 100-continue"),
    "TE": _get("TE: trailers"),
    "a list in Connection": _get("Connection: keep-alive, x-a", "X-A: b"),
    "a list in Connection that closes": _get("Connection: close, close"),
    "Connection twice": _get("Connection: keep-alive", "Connection: close"),
    "an empty Connection": _get("Connection:"),
    "Keep-Alive": _get("Keep-Alive: timeout=5"),
    "Proxy-Connection": _get("Proxy-Connection: keep-alive"),
    "Proxy-Authorization": _get("Proxy-Authorization: Basic eDp5"),
    "Proxy-Authenticate": _get("Proxy-Authenticate: Basic"),
    "Forwarded": _get("Forwarded: for=192.0.2.1"),
    "X-Kamal-Target": _get("X-Kamal-Target: a:1"),
    "X-Forwarded-For twice": _get("X-Forwarded-For: 1.1.1.1", "x-forwarded-for: 2.2.2.2"),
    "an empty X-Forwarded-For": _get("X-Forwarded-For: "),
    "X-Forwarded-Proto twice": _get("X-Forwarded-Proto: http", "X-Forwarded-Proto: https"),
    "X-Forwarded-Host twice": _get("X-Forwarded-Host: a", "X-Forwarded-Host: b"),
    "X-Request-ID twice": _get("X-Request-ID: a", "X-Request-ID: b"),
    "an empty X-Request-ID": _get("X-Request-ID:"),
    "X-Request-Start twice": _get("X-Request-Start: t=1", "X-Request-Start: t=2"),
    "User-Agent twice": _get("User-Agent: a", "User-Agent: b"),
    "Content-Type twice": _post("Content-Type: a", "Content-Type: b", "Content-Length: 0"),
    "an address of IPv6": head("GET / HTTP/1.1", "Host: [::1]:3000"),
    "101 fields": head("GET / HTTP/1.1", "Host: a", *(["a:"] * 100)),
    "200 fields": head("GET / HTTP/1.1", "Host: a", *(["a: b"] * 199)),
    "an empty line before": b"\r\n" + _get(),
    "the absolute form": head("GET http://app.test/ HTTP/1.1", "Host: app.test"),
    "the asterisk": head("OPTIONS * HTTP/1.1", "Host: app.test"),
    "CONNECT": head("CONNECT app.test:443 HTTP/1.1", "Host: app.test:443"),
    "CONNECT with a path": head("CONNECT / HTTP/1.1", "Host: app.test"),
    "TRACE": head("TRACE / HTTP/1.1", "Host: app.test"),
    "PROPFIND": head("PROPFIND / HTTP/1.1", "Host: app.test"),
    "a target in UTF-8": "GET /\u00fc HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    "HTTP/1.0": head("GET / HTTP/1.0", "Host: app.test"),
    "ab": head("GET / HTTP/1.0", "Connection: Keep-Alive", "Host: a", "User-Agent: ab/2.3"),
    "a tab in a value": _get("X-A: a\tb"),
    "a tab before a value": _get("X-A:\tb"),
    "a tab after a value": _get("X-A: b\t"),
    "an underscore": _get("X_A: b"),
    "an odd name": _get("X.A!: b"),
    "an odd host": head("GET / HTTP/1.1", "Host: a!b"),
    "a host that is too long": head("GET / HTTP/1.1", f"Host: {'h' * 261}"),
    "Content-Length with zeros": _post("Content-Length: 005"),
    "two zeros": _post("Content-Length: 00"),
    "a length that is too long": _post(f"Content-Length: 1{'0' * 15}"),
    # Malformed, or made to be read in two ways
    "nothing": b"",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
    "a response": head("HTTP/1.1 200 OK", "Content-Length: 0"),
    "HTTP/1.2": head("GET / HTTP/1.2", "Host: a"),
    "HTTP/2.0": head("GET / HTTP/2.0", "Host: a"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "http/1.1": head("GET / http/1.1", "Host: a"),
    "HTTP/1.10": head("GET / HTTP/1.10", "Host: a"),
    "a lower-case method": head("get / HTTP/1.1", "Host: a"),
    "half a method": head("GE / HTTP/1.1", "Host: a"),
    "a method that is too long": head("OPTIONSS / HTTP/1.1", "Host: a"),
    "no method": head(" / HTTP/1.1", "Host: a"),
    "no target": head("GET  HTTP/1.1", "Host: a"),
    "a target without a slash": head("GET x HTTP/1.1", "Host: a"),
    "two spaces": head("GET  / HTTP/1.1", "Host: a"),
    "two spaces after": head("GET /  HTTP/1.1", "Host: a"),
    "a tab for a space": head("GET\t/ HTTP/1.1", "Host: a"),
    "a space in the target": head("GET /a b HTTP/1.1", "Host: a"),
    "a space at the end": head("GET / HTTP/1.1 ", "Host: a"),
    "a space before": b" " + _get(),
    "a fragment": head("GET /a#b HTTP/1.1", "Host: a"),
    "a fragment in the query": head("GET /?a#b HTTP/1.1", "Host: a"),
    "a broken escape": head("GET /%zz HTTP/1.1", "Host: a"),
    "half an escape": head("GET /%2 HTTP/1.1", "Host: a"),
    "an escape cut by the query": head("GET /%2?a HTTP/1.1", "Host: a"),
    "no host": head("GET / HTTP/1.1", "Accept: */*"),
    "no field": head("GET / HTTP/1.1"),
    "an empty host": head("GET / HTTP/1.1", "Host:"),
    "only a port": head("GET / HTTP/1.1", "Host: :80"),
    "two hosts": _get("Host: b.test"),
    "the same host twice": _get("host: app.test"),
    "a list of hosts": head("GET / HTTP/1.1", "Host: a, b"),
    "a user in the host": head("GET / HTTP/1.1", "Host: a@b"),
    "a path in the host": head("GET / HTTP/1.1", "Host: a/b"),
    "a port that is none": head("GET / HTTP/1.1", "Host: a:8x"),
    "two ports": head("GET / HTTP/1.1", "Host: a:80:81"),
    "CL.TE": _post("Content-Length: 6", "Transfer-Encoding: chunked") + b"0\r\n\r\nG",
    "TE.CL": _post("Transfer-Encoding: chunked", "Content-Length: 3") + b"1\r\nG\r\n0\r\n\r\n",
    "CL.CL": _post("Content-Length: 0", "Content-Length: 44"),
    "the same length twice": _post("Content-Length: 5", "Content-Length: 5"),
    "a list of lengths": _post("Content-Length: 5, 5"),
    "lengths that differ": _post("Content-Length: 5, 6"),
    "a sign": _post("Content-Length: +5"),
    "a minus": _post("Content-Length: -5"),
    "hexadecimal": _post("Content-Length: 0x5"),
    "an underscore in a length": _post("Content-Length: 1_0"),
    "a space in a length": _post("Content-Length: 1 0"),
    "a fraction": _post("Content-Length: 5.0"),
    "an empty length": _post("Content-Length: "),
    "no length after all": _post("Content-Length: abc"),
    "digits that are none": _post("Content-Length: \xb2"),
    "TE.TE: two codings": _post("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    "TE.TE: chunked twice": _post("Transfer-Encoding: chunked", "Transfer-encoding: chunked"),
    "TE.TE: a list": _post("Transfer-Encoding: chunked, chunked"),
    "TE.TE: identity first": _post("Transfer-Encoding: identity, chunked"),
    "TE.TE: gzip": _post("Transfer-Encoding: gzip, chunked"),
    "TE.TE: identity": _post("Transfer-Encoding: identity"),
    "TE.TE: xchunked": _post("Transfer-Encoding: xchunked"),
    "TE.TE: chunke": _post("Transfer-Encoding: chunke"),
    "TE.TE: quoted": _post('Transfer-Encoding: "chunked"'),
    "TE.TE: a parameter": _post("Transfer-Encoding: chunked;x=y"),
    "TE.TE: a comma": _post("Transfer-Encoding: chunked,"),
    "TE.TE: a comma before": _post("Transfer-Encoding: ,chunked"),
    "TE.TE: empty": _post("Transfer-Encoding:"),
    "TE.TE: a space before the colon": _post("Transfer-Encoding : chunked"),
    "TE.TE: a tab before the colon": _post("Transfer-Encoding\t: chunked"),
    "TE.TE: a tab before the value": _post("Transfer-Encoding:\tchunked"),
    "TE.TE: a vertical tab": _post("Transfer-Encoding:\x0bchunked"),
    "TE.TE: a space before the name": _post("X: y", " Transfer-Encoding: chunked"),
    "TE.TE: a line feed before the name": _post("X: y\nTransfer-Encoding: chunked"),
    "TE.TE: a fold": _post("Transfer-Encoding:", " chunked"),
    "TE.TE: an underscore": _post("Transfer_Encoding: chunked", "Content-Length: 3"),
    "TE.TE: no colon": _post("Transfer-Encoding chunked"),
    "TE.TE: with NUL": _post("Transfer-Encoding: chunked\0"),
    "TE.TE: control": _post("Transfer-Encoding: \x01chunked"),
    "TE.TE: delete": _post("Transfer-Encoding: chunked\x7f"),
    "TE.TE: a line's end of its own": _post("Transfer-Encoding: chunked\r"),
    "TE.TE: Latin-1 letters": _post("Transfer-Encoding: \xe3hunked"),
    "a space before the colon": _get("Content-Length : 5"),
    "a fold": _get("X-A: a", " b"),
    "a fold by a tab": _get("X-A: a", "\tb"),
    "a folded first field": head("GET / HTTP/1.1", " Host: a"),
    "an empty name": _get(": b"),
    "no colon": _get("nonsense"),
    "a name with a space": _get("X A: b"),
    "a name in Latin-1": _get("\xdc: b"),
    "NUL in a value": _get("X-A: a\0b"),
    "NUL in a name": _get("X\0A: b"),
    "a CR in a value": _get("X-A: a\rb"),
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "one bare LF": b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
    "a bare LF at the end": b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    "a bare CR at the end": b"GET / HTTP/1.1\r\nHost: a\r\n\r\r\n",
    "a bare CR for a line's end": b"GET / HTTP/1.1\rHost: a\r\r",
    "a bare LF after the request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
}  # fmt: skip

# With the method that they answer
ORDINARY_RESPONSES = {
    "nginx": (
        b"GET",
        _ok(
            *("Server: nginx/1.26.1", "Date: Tue, 02 Jul 2024 10:00:00 GMT"),
            *("Content-Type: text/html; charset=utf-8", "Content-Length: 5"),
            *("Last-Modified: Mon, 01 Jul 2024 10:00:00 GMT", "Connection: keep-alive"),
            *('ETag: "66827f10-264"', "Accept-Ranges: bytes"),
        )
        + b"hello",
    ),
    "Apache": (
        b"GET",
        _ok(
            *("Date: Tue, 02 Jul 2024 10:00:00 GMT", "Server: Apache/2.4.59 (Debian)"),
            *("Vary: Accept-Encoding", "Content-Length: 2", "Keep-Alive: timeout=5, max=100"),
            *("Connection: Keep-Alive", "Content-Type: text/html;charset=UTF-8"),
        )
        + b"ok",
    ),
    "Puma": (
        b"GET",
        _ok(
            *("x-frame-options: SAMEORIGIN", "x-xss-protection: 0", "vary: Accept"),
            *("content-type: text/html; charset=utf-8", 'etag: W/"a1"', "x-runtime: 0.012"),
            *("cache-control: max-age=0, private, must-revalidate", "server-timing: sql;dur=1.1"),
            "set-cookie: _session=a%2Bb--c; path=/; HttpOnly; SameSite=Lax",
            "set-cookie: theme=dark; path=/; expires=Wed, 02 Jul 2025 10:00:00 GMT",
            *("x-request-id: 7f1c-22", "Content-Length: 3"),
        )
        + b"abc",
    ),
    "Puma in chunks": (
        b"GET",
        _ok("content-type: text/html", "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\n\r\n",
    ),
    "gunicorn": (
        b"GET",
        _ok(
            *("Server: gunicorn", "Date: Tue, 02 Jul 2024 10:00:00 GMT", "Connection: close"),
            *("Content-Type: application/json", "Content-Length: 2"),
        )
        + b"{}",
    ),
    "uvicorn": (
        b"POST",
        head(
            *("HTTP/1.1 201 Created", "date: Tue, 02 Jul 2024 10:00:00 GMT", "server: uvicorn"),
            *("content-length: 8", "content-type: application/json"),
        )
        + b'{"id":1}',
    ),
    "Express": (
        b"GET",
        _ok(
            *("X-Powered-By: Express", "Access-Control-Allow-Origin: *", "Content-Length: 12"),
            *("Content-Type: application/json; charset=utf-8", 'ETag: W/"c-Lve95gjOVAT"'),
            *("Date: Tue, 02 Jul 2024 10:00:00 GMT", "Connection: keep-alive"),
            "Keep-Alive: timeout=5",
        )
        + b'{"hello": 1}',
    ),
    "PHP-FPM": (
        b"GET",
        _ok(
            *("Server: nginx", "Content-Type: text/html; charset=UTF-8", "X-Powered-By: PHP/8.3.8"),
            *("Transfer-Encoding: chunked", "Connection: keep-alive", "Pragma: no-cache"),
            *("Expires: Thu, 19 Nov 1981 08:52:00 GMT", "Set-Cookie: PHPSESSID=abc; path=/"),
        )
        + b"0\r\n\r\n",
    ),
    "Go": (
        b"DELETE",
        _ok("Content-Type: text/plain; charset=utf-8", "X-Content-Type-Options: nosniff")
        .replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n"),
    ),
    "Tomcat": (b"GET", head("HTTP/1.1 200 ", "Content-Length: 0", "Date: x")),
    "HEAD": (b"HEAD", _ok("Content-Length: 123456", "Content-Type: text/html")),
    "OPTIONS": (b"OPTIONS", head("HTTP/1.1 204 No Content", "Allow: GET, HEAD")),
    "no content": (b"GET", head("HTTP/1.1 204 No Content")),
    "no content of no length": (b"GET", head("HTTP/1.1 204 No Content", "Content-Length: 0")),
    "not modified": (b"GET", head("HTTP/1.1 304 Not Modified", 'ETag: "a"', "Cache-Control: x")),
    "not modified, of HEAD": (b"HEAD", head("HTTP/1.1 304 Not Modified")),
    "a redirect": (
        b"GET",
        head("HTTP/1.1 302 Found", "Location: https://a.test/login?x=y#z", "Content-Length: 0"),
    ),
    "a page that is missing": (
        b"GET",
        head("HTTP/1.1 404 Not Found", "Content-Length: 9", "Content-Type: text/plain")
        + b"not found",
    ),
    "an error": (b"PUT", head("HTTP/1.1 500 Internal Server Error", "Content-Length: 0")),
    "the last status": (b"PATCH", head("HTTP/1.1 599 ???", "Content-Length: 0")),
    "a range": (
        b"GET",
        head("HTTP/1.1 206 Partial Content", "Content-Range: bytes 0-1/5", "Content-Length: 2")
        + b"ab",
    ),
    "streamed": (
        b"GET",
        _ok(
            *("Content-Type: text/event-stream", "Cache-Control: no-cache"),
            *("X-Accel-Buffering: no", "Transfer-Encoding: Chunked"),
        )
        + b"5\r\ndata:\r\n",
    ),
    "no space after colons": (b"GET", _ok("Content-Length:0", "Connection:close", "A:")),
    "spaces around values": (b"GET", _ok("Content-Length:   7   ", "A:   b  c   ")),
    "Latin-1 in a value": (b"GET", _ok("Content-Length: 0", "X-Name: J\xfcrgen")),
    "100 fields": (b"GET", _ok("Transfer-Encoding:chunked", *(["a:"] * 99))),
    "the longest length": (b"GET", _ok(f"Content-Length: {'9' * 15}")),
    "names that are almost known": (
        b"GET",
        _ok("Hosts: a", "T-: x", "Upgrad-: x", "Keep-Aliv-: x", "Content-Length: 0", "Trailer: x"),
    ),
    "fields of requests": (b"GET", _ok("Content-Length: 0", "Expect: x", "X-Forwarded-For: x")),
}  # fmt: skip

ODD_RESPONSES = {
    # Legitimate, and rare enough to be left to h11
    "until the end": (b"GET", _ok("Content-Type: text/html", "Connection: close")),
    "HTTP/1.0": (b"GET", head("HTTP/1.0 200 OK", "Content-Length: 0")),
    "Apache that offers HTTP/2": (
        b"GET",
        _ok("Upgrade: h2,h2c", "Connection: Upgrade, Keep-Alive", "Content-Length: 0"),
    ),
    "Upgrade": (b"GET", _ok("Upgrade: h2c", "Content-Length: 0")),
    "switching": (
        b"GET",
        head("HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"),
    ),
    "continue": (b"POST", head("HTTP/1.1 100 Continue")),
    "early hints": (b"GET", head("HTTP/1.1 103 Early Hints", "Link: </a>; rel=preload")),
    "HEAD of what comes in chunks": (b"HEAD", _ok("Transfer-Encoding: chunked")),
    "HEAD without a length": (b"HEAD", _ok("Content-Type: text/html")),
    "no content with a length": (b"GET", head("HTTP/1.1 204 No Content", "Content-Length: 5")),
    "no content in chunks": (b"GET", head("HTTP/1.1 204 No Content", "Transfer-Encoding: chunked")),
    "not modified with a length": (
        b"GET",
        head("HTTP/1.1 304 Not Modified", "Content-Length: 123"),
    ),
    "not modified in chunks": (
        b"GET",
        head("HTTP/1.1 304 Not Modified", "Transfer-Encoding: chunked"),
    ),
    "no reason and no space": (b"GET", head("HTTP/1.1 200", "Content-Length: 0")),
    "a reason in Latin-1": (b"GET", head("HTTP/1.1 200 \xfc", "Content-Length: 0")),
    "a tab in the reason": (b"GET", head("HTTP/1.1 200 a\tb", "Content-Length: 0")),
    "a tab in a value": (b"GET", _ok("Content-Length: 0", "A: b\tc")),
    "a status over 599": (b"GET", head("HTTP/1.1 600 x", "Content-Length: 0")),
    "Proxy-Authenticate": (
        b"GET",
        head("HTTP/1.1 407 x", "Proxy-Authenticate: Basic", "Content-Length: 0"),
    ),
    "Proxy-Authorization": (b"GET", _ok("Proxy-Authorization: x", "Content-Length: 0")),
    "Proxy-Connection": (b"GET", _ok("Proxy-Connection: close", "Content-Length: 0")),
    "TE": (b"GET", _ok("TE: x", "Content-Length: 0")),
    "Host": (b"GET", _ok("Date: x", "Host: a", "Content-Length: 0")),
    "a list in Connection": (b"GET", _ok("Connection: x-a", "X-A: b", "Content-Length: 0")),
    "Connection twice": (
        b"GET",
        _ok("Connection: close", "Connection: keep-alive", "Content-Length: 0"),
    ),
    "Content-Type twice": (b"GET", _ok("Content-Type: a", "Content-Type: b", "Content-Length: 0")),
    "an empty Content-Type": (b"GET", _ok("Content-Type:", "Content-Length: 0")),
    "X-Accel-Buffering twice": (
        b"GET",
        _ok("X-Accel-Buffering: no", "X-Accel-Buffering: yes", "Content-Length: 0"),
    ),
    "an underscore": (b"GET", _ok("X_A: b", "Content-Length: 0")),
    "101 fields": (b"GET", _ok("Content-Length: 0", *(["a:"] * 100))),
    "a length with zeros": (b"GET", _ok("Content-Length: 05")),
    "a fold": (b"GET", _ok("Content-Length: 0", "A: b", " c")),
    # Malformed, or made to be read in two ways
    "nothing": (b"GET", b""),
    "a request": (b"GET", _get()),
    "HTTP/2": (b"GET", head("HTTP/2 200", "Content-Length: 0")),
    "HTTP/1.2": (b"GET", head("HTTP/1.2 200 OK", "Content-Length: 0")),
    "another protocol": (b"GET", b"SSH-2.0-OpenSSH_9.7\r\n"),
    "HTTP/0.9": (b"GET", b"<html>\r\n\r\n"),
    "an empty line before": (b"GET", b"\r\n" + _ok("Content-Length: 0")),
    "a status of two digits": (b"GET", head("HTTP/1.1 20 OK", "Content-Length: 0")),
    "a status of four digits": (b"GET", head("HTTP/1.1 2000 OK", "Content-Length: 0")),
    "a status that is none": (b"GET", head("HTTP/1.1 2x0 OK", "Content-Length: 0")),
    "a status below 100": (b"GET", head("HTTP/1.1 099 OK", "Content-Length: 0")),
    "two spaces": (b"GET", head("HTTP/1.1  200 OK", "Content-Length: 0")),
    "a control character in the reason": (b"GET", head("HTTP/1.1 200 a\x01", "Content-Length: 0")),
    "two lengths": (b"GET", _ok("Content-Length: 1", "Content-Length: 2")),
    "the same length twice": (b"GET", _ok("Content-Length: 1", "Content-Length: 1")),
    "a list of lengths": (b"GET", _ok("Content-Length: 1, 1")),
    "a sign": (b"GET", _ok("Content-Length: +1")),
    "hexadecimal": (b"GET", _ok("Content-Length: 0x1")),
    "an empty length": (b"GET", _ok("Content-Length:")),
    "a length and chunks": (b"GET", _ok("Content-Length: 1", "Transfer-Encoding: chunked")),
    "chunks and a length": (b"GET", _ok("Transfer-Encoding: chunked", "Content-Length: 1")),
    "chunked twice": (b"GET", _ok("Transfer-Encoding: chunked", "Transfer-Encoding: chunked")),
    "two codings": (b"GET", _ok("Transfer-Encoding: gzip, chunked")),
    "identity": (b"GET", _ok("Transfer-Encoding: identity")),
    "a space before the colon": (b"GET", _ok("Content-Length : 1")),
    "an empty name": (b"GET", _ok(": a", "Content-Length: 1")),
    "no colon": (b"GET", _ok("nonsense", "Content-Length: 1")),
    "NUL in a value": (b"GET", _ok("A: b\0c", "Content-Length: 1")),
    "a CR in a value": (b"GET", _ok("A: b\rc", "Content-Length: 1")),
    "bare LF": (b"GET", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    "a bare LF at the end": (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\n"),
    "a bare LF after the status line": (b"GET", b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n"),
    "a bare CR in the status line": (b"GET", b"HTTP/1.1 200 OK\rA: b\r\nContent-Length: 0\r\n\r\n"),
}  # fmt: skip

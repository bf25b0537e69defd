"""What help says of a command besides its description and its flags, which stand with its function.

Examples, variables, files, exit codes and related commands, by the command's words. Only data.
"""

from __future__ import annotations

import attrs

_SOCKET = {
    "KAMAL_PROXY_SOCKET": "The Unix socket on which the proxy listens for commands",
    "XDG_RUNTIME_DIR, TMPDIR": "Without it the socket is kamal-proxy.sock in the first of these "
    "that is set, or in /tmp",
}
_HOME = {"HOME": "The data directory is .config/kamal-proxy in it"}
_SETTINGS = {
    "KAMAL_PROXY_...": "A value for each flag that is not given, such as KAMAL_PROXY_HEAD_TIMEOUT "
    "for --head-timeout",
    "DEBUG, HTTP_PORT, HTTPS_PORT, METRICS_PORT, UDP_PORT": "The same for these flags",
    "NOTIFY_SOCKET": "Set by systemd, which is told there when the proxy serves and when it stops",
}
_DATA = "~/.config/kamal-proxy"
_FILES = {
    "kamal-proxy.sock": "The socket; where it is: see the environment",
    f"{_DATA}/kamal-proxy.state": "The HTTP services, to be there again after a restart",
    f"{_DATA}/kamal-proxy-udp.state": "The UDP services, and kamal-proxy-udp.sessions their "
    "sessions",
    f"{_DATA}/certs": "Certificates from certificate authorities, and their private keys",
}
_CODES = {
    "0": "It is done",
    "1": "It failed; the last line on stderr says why",
    "130": "Interrupted with Ctrl-C; what the proxy has begun, it finishes",
    "141": "What read the output went away",
}


@attrs.frozen
class Page:
    """What there is to know around one command.

    Attributes:
        examples: What one wants to do -> the command line that does it.
        environment: Variables -> what they are for.
        files: Likewise.
        codes: Exit code -> what it means.
        see_also: The words of related commands.
    """

    examples: dict[str, str]
    see_also: tuple[str, ...]
    environment: dict[str, str] = _SOCKET
    files: dict[str, str] = attrs.field(factory=dict)
    codes: dict[str, str] = _CODES


PAGES = {
    "": Page(
        {
            "Serve": "kamal-proxy run",
            "Deploy an application that listens on port 3000": "kamal-proxy deploy shop "
            "--target=127.0.0.1:3000 --host=shop.example.com --tls",
            "See what is served": "kamal-proxy list",
        },
        ("run", "deploy"),
        {**_SOCKET, **_HOME},
        _FILES,
    ),
    "run": Page(
        {
            "Serve on ports 80 and 443": "kamal-proxy run",
            "Serve on other ports, with metrics": "kamal-proxy run --http-port=8080 "
            "--https-port=8443 --metrics-port=9090",
            "The same, set by the environment": "HTTP_PORT=8080 HTTPS_PORT=8443 METRICS_PORT=9090 "
            "kamal-proxy run",
            "Serve behind a load balancer": "kamal-proxy run --trusted-proxy=192.0.2.0/24",
        },
        ("deploy", "deploy-udp", "list"),
        {**_SOCKET, **_HOME, **_SETTINGS},
        _FILES,
        {
            "0": "It was told to stop, and has",
            "1": "It could not start, or not go on; the last line on stderr says why",
        },
    ),
    "deploy": Page(
        {
            "Serve all hosts": "kamal-proxy deploy shop --target=shop-v1:3000",
            "Serve one host over HTTPS, with an automatic certificate": "kamal-proxy deploy shop "
            "--target=shop-v2:3000 --host=shop.example.com --tls",
            "Serve a part of a host": "kamal-proxy deploy api --target=api-v1:8080 "
            "--host=shop.example.com --path-prefix=/api",
            "Give slow starters time": "kamal-proxy deploy shop --target=shop-v3:3000 "
            "--deploy-timeout=2m --health-check-path=/ready",
        },
        ("remove", "pause", "rollout deploy", "certs list", "list"),
        {**_SOCKET, "HOME": "Certificates are kept in .config/kamal-proxy/certs in it"},
    ),
    "deploy-udp": Page(
        {
            "Serve a game": "kamal-proxy deploy-udp game --target=game-1:9999 --port=9999",
            "Replace it and let those who play finish": "kamal-proxy deploy-udp game "
            "--target=game-2:9999 --port=9999 --zero-downtime --drain-timeout=10m "
            "--force-kill-timeout=15m",
            "Serve calls": "kamal-proxy deploy-udp calls --target=media-2:7880 --protocol=webrtc "
            "--port-ranges=20000-22000 --zero-downtime",
        },
        ("remove", "list"),
    ),
    "remove": Page({"Take a service away": "kamal-proxy remove shop"}, ("stop", "deploy", "list")),
    "pause": Page(
        {
            "Let visitors wait while the database changes": "kamal-proxy pause shop --max-pause=2m",
            "Let them go on": "kamal-proxy resume shop",
        },
        ("resume", "stop"),
    ),
    "stop": Page(
        {
            "Close for a while": "kamal-proxy stop shop --message='Back at noon'",
            "Open again": "kamal-proxy resume shop",
        },
        ("resume", "pause", "remove"),
    ),
    "resume": Page({"Open again": "kamal-proxy resume shop"}, ("pause", "stop")),
    "list": Page(
        {
            "See what is served": "kamal-proxy list",
            "Give it to a program": "kamal-proxy list --json",
        },
        ("certs list",),
    ),
    "rollout": Page(
        {
            "Deploy a new version beside the old one": "kamal-proxy rollout deploy shop "
            "--target=shop-v3:3000",
            "Let some see it": "kamal-proxy rollout set shop --percent=10 --list=staff",
            "Let nobody see it": "kamal-proxy rollout stop shop",
            "Let all see it": "kamal-proxy deploy shop --target=shop-v3:3000",
        },
        ("deploy",),
    ),
    "rollout deploy": Page(
        {"Deploy new targets": "kamal-proxy rollout deploy shop --target=shop-v3:3000"},
        ("rollout set", "deploy"),
    ),
    "rollout set": Page(
        {
            "A tenth of the visitors": "kamal-proxy rollout set shop --percent=10",
            "Only those whose cookie is this": "kamal-proxy rollout set shop --list=staff,4711",
        },
        ("rollout deploy", "rollout stop"),
    ),
    "rollout stop": Page(
        {"Send all to the service's own targets": "kamal-proxy rollout stop shop"},
        ("rollout set", "deploy"),
    ),
    "certs": Page({"See until when certificates are valid": "kamal-proxy certs list"}, ("deploy",)),
    "certs list": Page(
        {
            "See until when certificates are valid": "kamal-proxy certs list",
            "Give it to a program": "kamal-proxy certs list --json",
        },
        ("certs renew", "deploy"),
    ),
    "certs renew": Page(
        {"Replace a certificate whose key got lost": "kamal-proxy certs renew shop.example.com"},
        ("certs list",),
    ),
    "completion": Page(
        {
            "In this bash only": "source <(kamal-proxy completion bash)",
            "In this fish only": "kamal-proxy completion fish | source",
        },
        ("completion bash", "completion fish", "completion zsh"),
    ),
    "completion bash": Page(
        {
            "For all users, as root": "kamal-proxy completion bash > "
            "/etc/bash_completion.d/kamal-proxy",
            "For you": "kamal-proxy completion bash > "
            "~/.local/share/bash-completion/completions/kamal-proxy",
            "Without the package bash-completion, in ~/.bashrc": "source <(kamal-proxy completion "
            "bash)",
        },
        ("completion fish", "completion zsh"),
    ),
    "completion fish": Page(
        {
            "For all users, as root": "kamal-proxy completion fish > "
            "/etc/fish/completions/kamal-proxy.fish",
            "For you": "kamal-proxy completion fish > ~/.config/fish/completions/kamal-proxy.fish",
        },
        ("completion bash", "completion zsh"),
    ),
    "completion zsh": Page(
        {
            "For all users, as root": "kamal-proxy completion zsh > "
            "/usr/local/share/zsh/site-functions/_kamal-proxy",
            "For you, with 'fpath=(~/.zfunc $fpath)' before compinit in ~/.zshrc": "kamal-proxy "
            "completion zsh > ~/.zfunc/_kamal-proxy",
            "In ~/.zshrc, after compinit": "source <(kamal-proxy completion zsh)",
        },
        ("completion bash", "completion fish"),
    ),
    "help": Page(
        {
            "How to deploy": "kamal-proxy help deploy",
            "The same": "kamal-proxy deploy --help",
        },
        (),
        {"COLUMNS": "How wide to write; by default as wide as the terminal"},
        codes={"0": "Always, also if there is no such command", "141": _CODES["141"]},
    ),
}

"""The store: the layout of the original, locks between processes, crashes, what is not a file."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamal_proxy.errors import CertificateStoreError
from kamal_proxy.tls.store import LETS_ENCRYPT, CertificateStore, Lock
from tests.certificates import Issued, key_pem, make_ca

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOW = 1_800_000_000.0
STAGING = "https://acme-staging-v02.api.letsencrypt.org/directory"
HOST = "app.example.com"
CA = make_ca()
ISSUED = CA.issue(HOST, days=3650)


def issue(*names: str, **options: Any) -> Issued:
    return CA.issue(*(names or (HOST,)), days=3650, **options)


def put(store: CertificateStore, name: str, content: bytes) -> Path:
    store.path.mkdir(parents=True, exist_ok=True)
    path = store.path / name
    path.write_bytes(content)
    return path


@pytest.fixture
def store(tmp_path: Path) -> CertificateStore:
    return CertificateStore(tmp_path / "data" / "certs", "")


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> CertificateStore:
    return CertificateStore(tmp_path_factory.mktemp("certs"), "")


# The layout


@pytest.mark.parametrize(
    ("directory", "hashed"),
    [
        ("", ""),
        (LETS_ENCRYPT, ""),
        (STAGING, STAGING),
        ("https://ca.test/dir", "https://ca.test/dir"),
    ],
)
def test_each_authority_has_its_directory(tmp_path: Path, directory: str, hashed: str) -> None:
    expected = tmp_path / hashlib.sha256(hashed.encode()).hexdigest()
    assert CertificateStore(tmp_path, directory).path == expected


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_a_certificate_of_the_original_is_found(store: CertificateStore, kind: Any) -> None:
    """Go's autocert writes the key in the format of before PKCS #8, then the chain."""
    issued = issue(key=kind)
    name = HOST if kind == "ec" else f"{HOST}+rsa"
    put(store, name, key_pem(issued.key, traditional=True) + issued.chain_pem + CA.pem)
    found = store.load(HOST, NOW)
    assert found is not None
    assert found.names == (HOST,)
    assert len(found.chain) == 2


def test_what_is_saved_is_what_the_original_would_read(store: CertificateStore) -> None:
    issued = issue()
    store.save(HOST, issued.chain_pem, issued.key_pem)
    assert (store.path / HOST).read_bytes() == issued.key_pem + issued.chain_pem
    found = store.load(HOST, NOW)
    assert found is not None
    assert found.serial == issued.certificate.serial_number
    assert store.load("other.example.com", NOW) is None


def test_only_the_owner_may_read_it(store: CertificateStore) -> None:
    issued = issue()
    umask = os.umask(0)
    try:
        store.save(HOST, issued.chain_pem, issued.key_pem)
        store.save_account_key(b"key")
        store.save_ledger(b"{}")
        store.save_token("token", b"answer")
        store.save_challenge(HOST, issued.chain_pem, issued.key_pem)
        with store.lock(HOST) or pytest.fail("no lock"):
            modes = {path.stat().st_mode & 0o777 for path in store.path.iterdir()}
    finally:
        os.umask(umask)
    assert modes == {0o600}
    assert store.path.stat().st_mode & 0o777 == 0o700
    assert store.path.parent.stat().st_mode & 0o777 == 0o700


def test_an_rsa_certificate_does_until_it_has_expired(store: CertificateStore) -> None:
    elliptic, rsa = CA.issue(HOST, days=2000), issue(key="rsa")
    put(store, f"{HOST}+rsa", rsa.key_pem + rsa.chain_pem)
    found = store.load(HOST, NOW)
    assert found is not None
    assert found.key_type == "RSA 2048"
    store.save(HOST, elliptic.chain_pem, elliptic.key_pem)
    found = store.load(HOST, NOW)
    assert found is not None
    assert found.key_type == "ECDSA P-256"
    old = CA.issue(HOST, days=1)
    store.save(HOST, old.chain_pem, old.key_pem)
    found = store.load(HOST, NOW)
    assert found is not None
    assert found.key_type == "RSA 2048"
    found = store.load(HOST, NOW + 1e10)
    assert found is not None, "an expired one is better than none"


def test_the_account_and_the_ledger(store: CertificateStore) -> None:
    assert store.account_key() is None
    assert store.ledger() is None
    store.save_account_key(b"key")
    store.save_ledger(b"{}")
    assert store.account_key() == b"key"
    assert store.ledger() == b"{}"
    names = {path.name for path in store.path.iterdir()}
    assert names == {"acme_account+key", "acme_attempts+json"}


def test_answers_to_challenges(store: CertificateStore) -> None:
    issued = issue()
    other = CertificateStore(store.path.parent, "")
    assert other.token("abc-_Z9") is None
    assert other.challenge(HOST) is None
    store.save_token("abc-_Z9", b"abc.thumb")
    store.save_challenge(HOST, issued.chain_pem, issued.key_pem)
    assert other.token("abc-_Z9") == b"abc.thumb"
    found = other.challenge(HOST)
    assert found is not None
    assert found.serial == issued.certificate.serial_number
    assert other.load(HOST, NOW) is None, "that of a challenge is not that of the host"
    store.remove_token("abc-_Z9")
    store.remove_challenge(HOST)
    store.remove_token("abc-_Z9")
    assert list(store.path.iterdir()) == []


# Names that strangers choose


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b", "x" * 200, "\u00e9", "a+b", "a.b"]
)
def test_no_token_leaves_the_directory(store: CertificateStore, name: str) -> None:
    put(store, "x", b"secret")
    assert store.token(name) is None
    with pytest.raises(CertificateStoreError, match="can't be the token"):
        store.save_token(name, b"")
    store.remove_token("nothing")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\0b", "A.example", "*.example.com"])
def test_no_host_leaves_the_directory(store: CertificateStore, name: str) -> None:
    assert store.challenge(name) is None
    with pytest.raises(CertificateStoreError, match="no certificate is kept"):
        store.load(name, NOW)
    with pytest.raises(CertificateStoreError, match="no certificate is kept"):
        store.save(name, b"", b"")
    with pytest.raises(CertificateStoreError, match="no certificate is kept"):
        store.save_challenge(name, b"", b"")


@pytest.mark.fuzz
@given(st.text(max_size=300))
def test_any_text_is_looked_for(name: str) -> None:
    store = CertificateStore("/nonexistent", "")
    assert store.token(name) is None
    assert store.challenge(name) is None


@pytest.mark.fuzz
@given(st.data())
def test_any_files_are_loaded_or_refused(one_store: CertificateStore, data: st.DataObject) -> None:
    part = st.sampled_from([ISSUED.key_pem, ISSUED.chain_pem, b"-----BEGIN CERTIFICATE-----\n"])
    content = st.lists(part | st.binary(max_size=9), max_size=4).map(b"".join)
    for name in (HOST, f"{HOST}+rsa", f"{HOST}+token"):
        put(one_store, name, data.draw(content))
    for load in (partial(one_store.load, HOST, NOW), partial(one_store.challenge, HOST)):
        try:
            found = load()
        except CertificateStoreError:
            continue
        assert found is not None
        assert found.matches(HOST)


# What is not as it should be


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not PEM"),
        (b"garbage", "not PEM"),
        (b"-----BEGIN EC PRIVATE KEY-----\nAAAA\n", "malformed"),
        (b"\0" * 600_000, "larger than"),
    ],
)
def test_a_file_that_is_no_certificate(store: CertificateStore, content: bytes, why: str) -> None:
    path = put(store, HOST, content)
    with pytest.raises(CertificateStoreError, match=why) as caught:
        store.load(HOST, NOW)
    assert str(path) in str(caught.value)


def test_a_cut_file(store: CertificateStore) -> None:
    issued = issue()
    whole = issued.key_pem + issued.chain_pem
    for size in range(0, len(whole), 97):
        put(store, HOST, whole[:size])
        with pytest.raises(CertificateStoreError):
            store.load(HOST, NOW)


def test_a_certificate_for_somebody_else(store: CertificateStore) -> None:
    issued = issue("other.example.com")
    put(store, HOST, issued.key_pem + issued.chain_pem)
    with pytest.raises(CertificateStoreError, match=r"it is not for app\.example\.com"):
        store.load(HOST, NOW)


def test_a_good_one_beside_a_bad_one_does(store: CertificateStore) -> None:
    issued = issue(key="rsa")
    put(store, HOST, b"garbage")
    put(store, f"{HOST}+rsa", issued.key_pem + issued.chain_pem)
    assert store.load(HOST, NOW) is not None


def test_what_is_no_file_is_never_waited_for(store: CertificateStore) -> None:
    store.path.mkdir(parents=True)
    os.mkfifo(store.path / HOST)
    (store.path / "token+http-01").mkdir()
    os.mkfifo(store.path / "acme_account+key")
    with pytest.raises(CertificateStoreError, match="not a regular file"):
        store.load(HOST, NOW)
    with pytest.raises(CertificateStoreError):
        store.token("token")
    with pytest.raises(CertificateStoreError, match="not a regular file"):
        store.account_key()


def test_a_directory_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "certs").write_text("a file")
    store = CertificateStore(tmp_path / "certs", "")
    writes: list[Callable[[], object]] = [
        lambda: store.save(HOST, b"", b""),
        lambda: store.save_token("token", b""),
        lambda: store.lock(HOST),
    ]
    for write in writes:
        with pytest.raises(CertificateStoreError, match="Not a directory"):
            write()
    with pytest.raises(CertificateStoreError, match="Not a directory"):
        store.load(HOST, NOW)


def test_a_full_disk_keeps_what_was_there(
    store: CertificateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = issue()
    store.save(HOST, issued.chain_pem, issued.key_pem)
    whole = (store.path / HOST).read_bytes()
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) <= 100:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CertificateStoreError, match=r"No space left.*; free some space"):
        store.save(HOST, b"x" * 5000, b"")
    assert (store.path / HOST).read_bytes() == whole
    assert [path.name for path in store.path.iterdir()] == [HOST]


def test_writes_that_are_cut_short_are_gone_on_with(
    store: CertificateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    store.save_ledger(b"0123456789" * 10)
    assert store.ledger() == b"0123456789" * 10


# Crashes

_WRITER = """
import sys
from kamal_proxy.tls.store import CertificateStore
store = CertificateStore(sys.argv[1], "")
contents = [letter * 200_000 for letter in (b"a", b"b")]
print("ready", flush=True)
while True:
    for content in contents:
        with store.lock("acme_attempts", 10):
            store.save_ledger(content)
"""


def test_a_process_that_is_killed_leaves_a_whole_file(store: CertificateStore) -> None:
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(store.path.parent)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while store.ledger() is None:
                pass
            seen = {content[:1] for content in (store.ledger() for _ in range(20)) if content}
            process.send_signal(signal.SIGKILL)
        content = store.ledger()
        assert content in (b"a" * 200_000, b"b" * 200_000)
        assert seen
        with store.lock("acme_attempts") or pytest.fail("the lock outlives its process"):
            store.save_ledger(b"{}")
        assert {path.name for path in store.path.iterdir()} == {"acme_attempts+json"}
        (store.path / "acme_attempts+json").unlink()


def test_what_crashes_have_left_is_removed_after_a_day(store: CertificateStore) -> None:
    for name in ("old+http-01", f"{HOST}+token", ".x.tmp", HOST, f"{HOST}+rsa", "acme_account+key"):
        os.utime(put(store, name, b""), (1_000_000, 1_000_000))
    put(store, "new+http-01", b"")
    (store.path / "dir.tmp").mkdir()
    store.tidy()
    names = {path.name for path in store.path.iterdir()}
    assert names == {HOST, f"{HOST}+rsa", "acme_account+key", "new+http-01", "dir.tmp"}


def test_there_may_be_nothing_to_tidy(store: CertificateStore, tmp_path: Path) -> None:
    store.tidy()
    (tmp_path / "file").write_text("")
    with pytest.raises(CertificateStoreError, match="can't tidy"):
        CertificateStore(tmp_path / "file", "").tidy()


# Locks


def test_a_lock_is_held_once(store: CertificateStore) -> None:
    first = store.lock(HOST)
    assert first is not None
    assert store.lock(HOST) is None
    other = store.lock("other.example.com")
    assert other is not None
    first.close()
    first.close()
    other.close()
    with store.lock(HOST) or pytest.fail("it was released"):
        assert store.lock(HOST, 0.01) is None
    assert list(store.path.iterdir()) == []


_HOLDER = """
import sys
from kamal_proxy.tls.store import CertificateStore
lock = CertificateStore(sys.argv[1], "").lock("app.example.com")
print(lock is not None, flush=True)
sys.stdin.read()
"""


def test_another_process_holds_it_until_it_ends(store: CertificateStore) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(store.path.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"True\n"
        assert store.lock(HOST) is None
        process.kill()
        process.wait()
        with store.lock(HOST, 10) or pytest.fail("it was not released"):
            pass


def test_a_lock_is_waited_for(store: CertificateStore) -> None:
    first = store.lock(HOST)
    assert first is not None
    waiting = threading.Event()
    got: list[bool] = []

    def wait() -> None:
        waiting.set()
        lock = store.lock(HOST, 60)
        got.append(lock is not None)
        if lock is not None:
            lock.close()

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    first.close()
    thread.join()
    assert got == [True]


def test_a_lock_whose_file_is_removed_before_it_is_taken(
    store: CertificateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder releases it, and a third takes it, between opening the file and locking it."""
    first = store.lock(HOST)
    assert first is not None
    third: list[Lock | None] = []
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.close()
        third.append(store.lock(HOST))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert store.lock(HOST) is None
    assert third[0] is not None
    third[0].close()


def test_never_two_at_once_though_its_file_comes_and_goes(store: CertificateStore) -> None:
    inside = 0
    most = 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            lock = store.lock(HOST, 60)
            assert lock is not None
            with lock:
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(store.path.iterdir()) == []

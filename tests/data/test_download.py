"""The downloader against a real HTTP server on loopback: broken, forgetful, refusing and dishonest ones."""

import hashlib
import http.server
import io
import stat
import threading
import zipfile

import pytest

from llmrec_peft.data import download
from llmrec_peft.data.download import ARCHIVES, download_movielens, fetch, main, unpack
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import DataError

CONTENT = bytes(range(256)) * 4_000  # about a megabyte


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; the server's attributes say how it misbehaves."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, content = self.server, self.server.content
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        if server.refuse:
            self.send_error(server.refuse)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cut is not None:
            body = body[: server.cut]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.0)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.content, running.requests = CONTENT, []
        running.refuse, running.cut, running.ranges, running.shift = 0, None, True, 0
        running.url = f"http://127.0.0.1:{running.server_port}/ml.zip"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def archive(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name, text in members.items():
            content.writestr(name, text)
    return buffer.getvalue()


MOVIELENS = archive(
    {
        "ml-latest-small/ratings.csv": "userId,movieId,rating,timestamp\n1,10,4.0,100\n2,10,2.5,90\n",
        "ml-latest-small/movies.csv": 'movieId,title,genres\n10,"Heat, The (1995)",Action|Crime\n',
    }
)


def test_whole_file(server, tmp_path):
    path = fetch(server.url, tmp_path / "file", sha256(CONTENT))
    assert path.read_bytes() == CONTENT and server.requests == [None]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    fetch(server.url, path, "md5:" + hashlib.md5(CONTENT).hexdigest())
    assert len(server.requests) == 1  # there already, and right


def test_interrupted_transfer_is_resumed_in_the_same_call(server, tmp_path):
    server.cut = 400_000
    assert fetch(server.url, tmp_path / "file", sha256(CONTENT)).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=400000-", "bytes=800000-"]


def test_interrupted_call_is_resumed_by_the_next(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:123_456])
    assert fetch(server.url, tmp_path / "file", sha256(CONTENT)).read_bytes() == CONTENT
    assert server.requests == ["bytes=123456-"]


def test_part_that_is_whole_needs_no_bytes(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "file", sha256(CONTENT)).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT)}-"]


def test_part_longer_than_the_file_starts_anew(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert fetch(server.url, tmp_path / "file", sha256(CONTENT)).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT) + 4}-", None]


def test_server_that_ignores_range_starts_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(b"x" * 1_000)
    assert fetch(server.url, tmp_path / "file", sha256(CONTENT)).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-"]


def test_server_that_sends_another_range_is_given_up(server, tmp_path):
    server.cut, server.shift = 400_000, 1
    with pytest.raises(DataError, match="broke off 5 times"):
        fetch(server.url, tmp_path / "file", sha256(CONTENT))


def test_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(DataError, match=f"{server.url} has sha256 [0-9a-f]+, expected 00ff; the file was removed"):
        fetch(server.url, tmp_path / "file", "sha256:00ff")
    assert list(tmp_path.iterdir()) == []


def test_server_that_always_breaks_off_keeps_the_part(server, tmp_path):
    server.cut = 0
    with pytest.raises(DataError, match=r"broke off 5 times at 0 bytes .*run again to resume from"):
        fetch(server.url, tmp_path / "file", sha256(CONTENT))
    assert len(server.requests) == download.ATTEMPTS and not (tmp_path / "file").exists()


@pytest.mark.parametrize(("code", "requests"), [(404, 1), (403, 1), (503, download.ATTEMPTS)])
def test_refusals(server, tmp_path, code, requests):
    server.refuse = code
    with pytest.raises(DataError, match=str(code)):
        fetch(server.url, tmp_path / "file", sha256(CONTENT))
    assert len(server.requests) == requests and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ml.zip", "ftp://127.0.0.1/x"])
def test_only_http_is_fetched(tmp_path, url):
    with pytest.raises(DataError, match="give http:// or https://"):
        fetch(url, tmp_path / "file", sha256(b""))
    assert list(tmp_path.iterdir()) == []


def test_checksum_must_name_its_algorithm(tmp_path):
    with pytest.raises(DataError, match="'abc' must be sha256:<hex> or md5:<hex>"):
        fetch("http://127.0.0.1:9/x", tmp_path / "file", "abc")


def test_every_known_archive_has_a_full_checksum():
    lengths = {"md5": 32, "sha256": 64}
    for name, known in ARCHIVES.items():
        algorithm, _, digits = known.checksum.partition(":")
        assert len(digits) == lengths[algorithm] and int(digits, 16) and known.url.endswith(f"/{name}.zip")


def test_movielens_is_downloaded_unpacked_and_read(server, tmp_path):
    server.content = MOVIELENS
    server.cut = len(MOVIELENS) // 2
    directory = download_movielens(directory=tmp_path, url=server.url, checksum=sha256(MOVIELENS))
    assert directory == tmp_path / "ml-latest-small"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ml-latest-small"]
    assert directory.stat().st_mode & stat.S_IROTH
    log = BehaviorLog.read(directory)
    assert log.items.column("title").to_pylist() == ["Heat, The (1995)"] and len(log) == 2
    requests = len(server.requests)
    assert download_movielens(directory=tmp_path, url=server.url, checksum=sha256(MOVIELENS)) == directory
    assert len(server.requests) == requests


def test_default_directory_follows_the_cache_variable(server, tmp_path, monkeypatch):
    server.content = MOVIELENS
    monkeypatch.setenv("LLMREC_PEFT_CACHE", str(tmp_path))
    directory = download_movielens(url=server.url, checksum=sha256(MOVIELENS))
    assert directory == tmp_path / "data" / "ml-latest-small"


def test_unknown_names():
    with pytest.raises(DataError, match="no archive 'ml-3m'; known are ml-latest-small, ml-100k, ml-1m"):
        download_movielens("ml-3m")
    with pytest.raises(DataError, match="must be a plain directory name"):
        download_movielens("../up", url="http://127.0.0.1:9/x", checksum="md5:00")


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "C:/evil.txt"])
def test_archives_cannot_write_outside(tmp_path, name):
    file = tmp_path / "bad.zip"
    file.write_bytes(archive({"good.txt": "x", name: "y"}))
    with pytest.raises(DataError, match="leads out of its directory"):
        unpack(file, tmp_path / "target")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.zip"]


def test_archives_cannot_hold_links(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as content:
        content.writestr(link, "/etc")
    with pytest.raises(DataError, match="holds the link 'link'"):
        unpack(tmp_path / "bad.zip", tmp_path / "target")


def test_archives_that_unpack_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNPACKED", 10)
    (tmp_path / "bad.zip").write_bytes(archive({"a": "x" * 11}))
    with pytest.raises(DataError, match="unpacks to 11 bytes, more than 10"):
        unpack(tmp_path / "bad.zip", tmp_path / "target")


@pytest.mark.parametrize("damage", ["not a zip", "flipped byte", "empty"])
def test_damaged_archives_leave_nothing(tmp_path, damage):
    content = bytearray(archive({"dir/a.txt": "hello " * 100, "dir/b.txt": "x"}))
    content[60] ^= 0xFF
    contents = {"not a zip": b"hello", "flipped byte": bytes(content), "empty": archive({})}
    (tmp_path / "bad.zip").write_bytes(contents[damage])
    with pytest.raises(DataError, match="download(ed)? (it )?again"):
        unpack(tmp_path / "bad.zip", tmp_path / "target")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.zip"]


def test_command_line(server, tmp_path, capsys):
    server.content = MOVIELENS
    options = ["--directory", str(tmp_path), "--url", server.url]
    assert main(["ml-latest-small", *options, "--checksum", sha256(MOVIELENS)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "ml-latest-small")
    assert main(["ml-1m", *options]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "expected a6898adb" in error

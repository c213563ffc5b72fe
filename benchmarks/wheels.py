"""`make gpu-wheels FOLDER=...`: gather the wheels that a GPU machine without a network lacks.

PRESENT lists what such a machine has. Starting from the project's dependencies, each unmet requirement is
downloaded with pip, at the version in constraints.txt if that is allowed, followed by the requirements of the
downloaded wheels. Then the metadata of all wheels is checked against what is gathered and present. Install
them on the machine, without a network:

    python3 -m pip install -q --no-index --no-deps --target build/site FOLDER/*.whl
    export PYTHONPATH=build/site
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PYTHON = "3.12"
# Packages on the GPU machine of November 2026. A name without a version is present in an unknown version.
_PRESENT = """
torch 2.11.0, triton 3.6.0, transformers 5.17.0, tokenizers 0.23.2, safetensors 0.8.0, huggingface-hub 1.33.0,
accelerate 1.15.0, numpy 2.5.2, tiktoken 0.14.0, sentencepiece 0.2.2, pyarrow, psutil, pyyaml, rich, typer,
matplotlib, jinja2, xxhash, pandas, peft, packaging, filelock, fsspec, tqdm, requests, regex, httpx, aiohttp,
pytest, pytest-timeout, pytest-xdist, hypothesis, setuptools, pip, click, shellingham, sympy, networkx,
pillow, protobuf, tensorboard, einops, ninja, msgpack, py-cpuinfo, python-dateutil, nvidia-ml-py,
annotated-doc, typing-extensions 4.15.0
"""  # typing-extensions: assumed older than the 4.16 that pydantic requires
_WORDS = [entry.split() for entry in _PRESENT.split(",")]
PRESENT: dict[str, str | None] = {words[0]: words[1] if words[1:] else None for words in _WORDS}
ENVIRONMENT = {
    "python_version": PYTHON,
    "python_full_version": "3.12.3",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "os_name": "posix",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "extra": "",
}
_GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # pip matches manylinux_2_N exactly


@dataclass(frozen=True)
class Wheel:
    """A gathered wheel: normalized name, version, requirements."""

    name: str
    version: str
    needs: tuple[Requirement, ...]


def read_wheel(path: Path) -> Wheel:
    """Read a wheel's METADATA."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name))
    needs = tuple(Requirement(text) for text in found.get_all("Requires-Dist") or ())
    return Wheel(canonicalize_name(found["Name"]), found["Version"], needs)


def gathered(folder: Path) -> dict[str, Wheel]:
    """Read all wheels of a folder. Raises ValueError for two of one package, which pip would not install."""
    found: dict[str, Wheel] = {}
    for path in sorted(folder.glob("*.whl")):
        wheel = read_wheel(path)
        if wheel.name in found:
            raise ValueError(f"two wheels of {wheel.name}; hint: delete one from {folder.name}")
        found[wheel.name] = wheel
    return found


def applies(need: Requirement, extras: Iterable[str] = ()) -> bool:
    """Whether a requirement applies to the machine, with any of the requested extras."""
    if need.marker is None:
        return True
    return any(need.marker.evaluate(ENVIRONMENT | {"extra": extra}) for extra in ("", *extras))


def problem_of(need: Requirement, versions: dict[str, str | None]) -> str | None:
    """Return why a requirement is not met; None if it is, or if a version is present but unknown."""
    name = canonicalize_name(need.name)
    if name not in versions:
        return f"{need} is missing"
    version = versions[name]
    if version is None or need.specifier.contains(Version(version), prereleases=True):
        return None
    return f"{need} is required, but {name} {version} is present"


def versions_of(wheels: dict[str, Wheel]) -> dict[str, str | None]:
    """Return the machine's packages once the wheels are installed."""
    return {**PRESENT, **{name: wheel.version for name, wheel in wheels.items()}}


def unmet(wheels: dict[str, Wheel], roots: Iterable[Requirement]) -> list[tuple[str, Requirement, str]]:
    """Return (dependent, requirement, reason) for each package that is missing or of a wrong version."""
    versions, found = versions_of(wheels), []
    asked: dict[str, set[str]] = {}
    known = [("horizon-lm", need) for need in roots]
    known += [(wheel.name, need) for wheel in wheels.values() for need in wheel.needs]
    for _, need in known:
        asked.setdefault(canonicalize_name(need.name), set()).update(need.extras)
    for who, need in known:
        reason = problem_of(need, versions) if applies(need, asked.get(who, ())) else None
        if reason:
            found.append((who, need, reason))
    return found


def own_needs() -> list[Requirement]:
    """Return the project's own dependencies."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return [Requirement(text) for text in tomllib.load(file)["project"]["dependencies"]]


def pins() -> dict[str, str]:
    """Return the versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parts = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in parts}


def pinned(need: Requirement, versions: dict[str, str]) -> str:
    """Return the requirement in pip's form: the tested version if that is allowed."""
    version = versions.get(canonicalize_name(need.name))
    if version and need.specifier.contains(Version(version), prereleases=True):
        return f"{need.name}=={version}"
    return f"{need.name}{need.specifier}"


def download(wanted: str, folder: Path) -> None:
    """Download one wheel for the machine, without dependencies. Raises RuntimeError with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    for number in _GLIBC:
        command += ["--platform", f"manylinux_2_{number}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
    done = subprocess.run([*command, "--dest", str(folder), wanted], capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
        raise RuntimeError(f"{wanted}: {lines[-1]}")


def gather(
    roots: list[Requirement], folder: Path, get: Callable[[str, Path], None] = download
) -> list[tuple[str, Requirement, str]]:
    """Download until pip can add nothing that is missing; return what is still unmet.

    If two packages require different versions, one is downloaded and the conflict is reported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tested, tried = pins(), set()
    while True:
        open_ = unmet(gathered(folder), roots)
        todo = [need for _, need, _ in open_ if canonicalize_name(need.name) not in tried]
        if not todo:
            return open_
        need = todo[0]
        tried.add(canonicalize_name(need.name))
        wanted = pinned(need, tested)
        print(f"downloading {wanted}", flush=True)
        get(wanted, folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-wheels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("extra", nargs="*", help="more packages, as NAME==VERSION")
    parser.add_argument("--check", action="store_true", help="check a folder, download nothing")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    try:
        roots = own_needs() + [Requirement(text) for text in arguments.extra]
        left = unmet(gathered(folder), roots) if arguments.check else gather(roots, folder)
    except (RuntimeError, ValueError) as error:
        print(f"gpu-wheels: {error}", file=sys.stderr)
        return 1
    wheels = sorted(folder.glob("*.whl"))
    total = sum(path.stat().st_size for path in wheels)
    print("\n".join(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}" for path in wheels))
    print(f"{total / 1e6:8.2f} MB  in {len(wheels)} wheels")
    for who, _, reason in left:
        print(f"gpu-wheels: {who}: {reason}", file=sys.stderr)
    if left:
        print("  hint: add a version that fits, as in ARGS='NAME==VERSION'", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

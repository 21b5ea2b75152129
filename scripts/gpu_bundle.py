"""Fill .gpu/ with what `make gpu` needs on a machine that has a GPU but no network: packages, and images of NEU-Seg.

    .venv/bin/python scripts/gpu_bundle.py [--shared ../shared] [--limit 64]

That machine has Python 3.12, torch and what usually comes with it (numpy, OpenCV, timm, safetensors, typer, rich, pyyaml,
jinja2, pillow, tifffile, pytest). The rest is downloaded here, in the versions of constraints.txt, and unpacked into one
folder for `sys.path`, which is what a wheel holds. Plotly's parts for Jupyter are left out, and
Zstandard's second backend.

Of NEU-Seg only the images of experiments/neu_seg_quick.yaml are packed, so that everything fits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parents[1]
BUNDLE = HERE / ".gpu"
PACKAGES = (
    "annotated-types",
    "narwhals",
    "plotly",
    "pydantic",
    "pydantic_core",
    "starlette",
    "typing-inspection",
    "uvicorn",
    "zstandard",
)
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_OUT = (
    "plotly/labextension/",
    "plotly/package_data/widgetbundle.js",
    "plotly/package_data/datasets/",
    "zstandard/_cffi",
)
LISTS = ("labeled_48.txt", "val.txt", "test.txt")  # of NEU-Seg
MIB = 1 << 20


def pinned(name: str) -> str:
    """A requirement as constraints.txt pins it, or the bare name."""
    lines = (HERE / "constraints.txt").read_text().splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if not line.startswith("#")]
    return next((pin for pin in pins if pin.partition("==")[0].lower() == name.lower()), name)


def pack_packages(out: Path) -> None:
    """Download the wheels and pack what they hold."""
    with tempfile.TemporaryDirectory() as folder:
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        target = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, "-d", folder]
        subprocess.run([*command, *map(pinned, PACKAGES)], check=True)
        site = Path(folder) / "site"
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as content:
                names = [n for n in content.namelist() if not n.startswith(LEFT_OUT) and ".data/" not in n]
                content.extractall(site, names)
        pack(out, {"site": site})


def pack(out: Path, contents: Mapping[str, Path]) -> None:
    """An archive of files and folders by their names in it, as small as xz makes it."""
    aside = out.with_name(out.name + ".aside")
    with tarfile.open(aside, "w:xz", preset=6) as archive:
        for name, path in contents.items():
            archive.add(path, name)
    aside.rename(out)


def neu_seg_of(data: Path) -> dict[str, Path]:
    """The files of NEU-Seg that the comparison reads, by their names in the archive."""
    unlabeled = HERE / "experiments" / "neu_seg_unlabeled.txt"
    ids = [
        line for path in (*(data / name for name in LISTS), unlabeled) for line in path.read_text().split()
    ]
    images = [f"images/{name}.jpg" for name in ids] + [f"labels/{name}.png" for name in ids]
    return {f"neu_seg/{name}": data / name for name in sorted({*images, *LISTS})}


def travels() -> int:
    """Bytes of the working tree that travel with the bundle: files that git tracks or does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=HERE, check=True, capture_output=True).stdout.split(b"\0")
    paths = [HERE / name.decode() for name in names if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=HERE.parent / "shared", help="with data/")
    parser.add_argument("--limit", type=int, default=64, help="MiB that code and bundle may have together")
    args = parser.parse_args()
    BUNDLE.mkdir(exist_ok=True)
    pack_packages(BUNDLE / "site.tar.xz")
    data = args.shared / "data" / "neu_seg"
    if data.is_dir():
        pack(BUNDLE / "neu_seg.tar.xz", neu_seg_of(data))
    else:
        print(f"{args.shared} has no data/neu_seg, so there will be no comparison.")
    sizes = {path.name: path.stat().st_size for path in sorted(BUNDLE.iterdir()) if path.is_file()}
    sizes["the working tree"] = travels()
    print("\n".join(f"{size / MIB:6.1f} MiB  {name}" for name, size in sizes.items()))
    whole = sum(sizes.values()) / MIB
    if whole > args.limit:
        sys.exit(f"{whole:.1f} MiB in all, more than {args.limit}. Carry fewer files.")


if __name__ == "__main__":
    main()

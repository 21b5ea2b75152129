"""Write docs/example_report.html: the report of a CamVid run, with the pictures of another run.

    .venv/bin/python scripts/example_report.py runs/camvid/seed_0/dars runs/photos docs/example_report.html

CamVid's photographs are for personal and research use and are not part of this repository, so the page's gallery shows
drawn scenes: those of docs/tutorial.md, or of `darseg demo`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from markupsafe import Markup

from darseg.report.facts import read_data, read_run
from darseg.report.overview import page_of, pictures_of

NOTE = Markup(
    '<p class="hint">The figures above are of CamVid, whose photographs may not be passed on. These pictures are of '
    "another run, on the drawn scenes of the tutorial, to show what this part looks like.</p>"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("pictures", type=Path, help="a run whose images may be shown")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    facts, pictured = read_run(arguments.run), read_run(arguments.pictures)
    page = page_of(facts, read_data(facts), NOTE + pictures_of(pictured, read_data(pictured)), seconds=0.0)
    print(page.write(arguments.out))


if __name__ == "__main__":
    main()

"""Audit where an answer comes from: totals by source, hits that come up for everything, a report.

    make demo                                 # once; its documents keep the fields module and kind
    python examples/audit_source.py
    python examples/audit_source.py your.index --by site --prompt "…" --completion " …"

`--by` is document, source, or a field that the build kept with --keep-fields.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import gradindex


def main() -> None:
    """Say which groups spoke for a completion, and how sure that is."""
    parser = argparse.ArgumentParser(description="Which source does an answer come from?")
    parser.add_argument("index", nargs="?", default=".demo/index")
    parser.add_argument("--by", default="module")
    parser.add_argument("--prompt", default="Write a message with severity")
    parser.add_argument("--completion", default=" 'ERROR' on the root logger")
    parser.add_argument("--report", type=Path, default=Path("report.html"))
    parser.add_argument("--sample", default="256", help="sequences that the report scores exactly")
    given = parser.parse_args()

    index = gradindex.open(given.index)
    result = index.search(prompt=given.prompt, completion=given.completion, group_by=given.by)

    # A group's total is over all of its sequences in the index, found or not, and large where the
    # group is. So groups come in order of z: by how many standard errors the total is above that of
    # as many sequences of the whole index. Take a group within two of them for one like all others.
    sure = sum(not group.unsure for group in result.groups)
    print(f"of {result.group_count:,} groups {len(result.groups)} are looked at; {sure} are more "
          "than two standard errors from the index's mean")
    for group in result.groups[:10]:
        print(f"  z {group.z:+5.1f}{'?' if group.unsure else ' '}  {group.influence:+14,.0f} ± "
              f"{group.standard_error:,.0f}  {group.sequences:,} sequences, {len(group.hits)} hits"
              f"  {group.value}")

    # A sequence that is among the highest hundredth for a quarter of the index's own background
    # queries says little about this one.
    generic = [hit for hit in result if hit.generic]
    print(f"{len(generic)} of the {len(result)} hits come up whatever is asked")
    for hit in generic:
        print(f"  {hit.generic_rate:.0%} of them: {hit.user_id}  {hit.text[:60]!r}")

    # What is in the index as a whole: one HTML page that needs nothing else. It shows its text.
    subprocess.run([sys.executable, "-m", "gradindex", "report", given.index, "-o",
                    str(given.report), "--sample", given.sample], check=True)
    print(f"the report is in {given.report}")


if __name__ == "__main__":
    main()

"""Draw the PHANTOM benchmark: two synthetic films for every study of an annotation, after what its real report says.

Reports, vocabulary, splits and distribution of labels are then the real ones; the images are drawings, and no score on
them is a score on the data set that the reports come from. The same seed gives the same files.

  python scripts/research/make_phantom.py --annotation data/iu_xray/annotation.json --coding NLMCXR_reports.tgz \\
      --out data/phantom

--coding gives Open-i's MeSH terms: its XML files as they are published, or a CSV with the columns mesh_major and
images. Studies without terms are drawn from their reports alone. Habitus, positioning, exposure and grain vary twice
as far as in the demo, and findings are drawn at 40 to 100 % of the demo's strength. See docs/experiments/phantom.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.flags import Parser
from modules.runtime.errors import run_entry_point
from modules.runtime.output_files import check_outside
from modules.runtime.run_log import Bar
from scripts.synthetic.drawing_arguments import add_drawing_arguments, check_drawing


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--annotation",
        type=Path,
        required=True,
        metavar="FILE",
        help="annotation.json with the reports and their splits, such as R2Gen's of IU X-Ray",
    )
    parser.add_argument(
        "--coding", type=Path, metavar="PATH", help="Open-i's MeSH coding: NLMCXR_reports.tgz, its folder, or a CSV"
    )
    add_drawing_arguments(parser)
    return parser


def main() -> None:
    """Read reports and coding, draw behind a progress bar, write the tables."""
    arguments = build_parser().parse_args()
    check_drawing(arguments)
    check_outside(arguments.out, [("--annotation", arguments.annotation), ("--coding", arguments.coding)])

    from modules.data.annotations import read_annotation
    from scripts.synthetic.anatomy import PHANTOM
    from scripts.synthetic.dataset import (
        SIGNATURE,
        draw_images,
        plan_studies,
        prepare_folder,
        require_splits,
        write_tables,
    )
    from scripts.synthetic.findings_csv import check_id, describe_format
    from scripts.synthetic.phantom import phantom_findings, read_coding

    annotation = read_annotation(arguments.annotation, required_splits=())
    coding = {} if arguments.coding is None else read_coding(arguments.coding)
    given = [study for split in annotation.splits.values() for study in split]
    for study in given:
        check_id(study.id, f"--annotation {arguments.annotation}, split {study.split}")
    findings = {study.id: phantom_findings(coding.get(study.id, ()), study.report) for study in given}
    reports = {study.id: (study.report, study.split) for study in given}
    studies = plan_studies(seed=arguments.seed, findings=findings, reports=reports)
    require_splits(studies, f"--annotation {arguments.annotation}")
    prepare_folder(arguments.out)
    drawn = draw_images(
        arguments.out, studies, seed=arguments.seed, size=arguments.size, workers=arguments.workers, variation=PHANTOM
    )
    for _ in Bar(drawn, "phantom studies", total=len(studies)):
        pass
    coded = sum(study.id in coding for study in given)
    origin = (
        f"{SIGNATURE} made by scripts/research/make_phantom.py, a PHANTOM. The reports are those of "
        f"{arguments.annotation.name} and keep its licence; no image shows a patient."
    )
    write_tables(
        arguments.out,
        studies,
        f"{len(studies)} studies, {coded} of them with MeSH coding; --seed "
        f"{arguments.seed}, {arguments.size} px.\n\n{describe_format()}",
        origin,
        # Without them a patient's studies would come into several folds.
        {
            study.id: {"study_id": study.study_id} | ({"subject_id": study.subject_id} if study.subject_id else {})
            for study in given
            if study.subject_id or study.study_id != study.id
        },
    )
    print(f"{len(studies)} phantom studies in {arguments.out}, {coded} of them with MeSH coding")


if __name__ == "__main__":
    run_entry_point(main)

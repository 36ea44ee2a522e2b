"""The dataset doctor: opens every file that a config names, and says what is wrong with it."""

from mmbcn.datasets.doctor.examine import Diagnosis, examine
from mmbcn.datasets.doctor.findings import Finding
from mmbcn.datasets.doctor.fix_list import write_fix_lists
from mmbcn.datasets.doctor.part import Part, open_parts
from mmbcn.datasets.doctor.pictures import write_pictures
from mmbcn.datasets.doctor.report import format_report

__all__ = [
    "Diagnosis",
    "Finding",
    "Part",
    "examine",
    "format_report",
    "open_parts",
    "write_fix_lists",
    "write_pictures",
]

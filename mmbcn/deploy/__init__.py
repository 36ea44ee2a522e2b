"""Models that train no more: norms folded into convolutions, files for other runtimes.

Here is what needs torch alone; `mmbcn.deploy.export` and the modules around it need the extra
``deploy`` and mmsegmentation.
"""

from mmbcn.deploy.folding import fold
from mmbcn.deploy.report import FoldReport

__all__ = ["FoldReport", "fold"]

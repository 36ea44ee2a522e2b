"""Models that mmsegmentation lacks."""

from mmbcn.errors import missing_package

try:
    import mmseg  # noqa: F401
except ModuleNotFoundError as error:
    raise missing_package("mmbcn.models", error.name or "mmseg") from error

from mmbcn.models.apr_data_preprocessor import APRPairDataPreProcessor
from mmbcn.models.aspp_head import PointwiseFuseASPPHead
from mmbcn.models.ic_heads import ICASPPHead, ICFCNHead, ICPointwiseFuseASPPHead
from mmbcn.models.ic_resnet import ICResNet, ICResNetV1c, ICResNetV1d

__all__ = [
    "APRPairDataPreProcessor",
    "ICASPPHead",
    "ICFCNHead",
    "ICPointwiseFuseASPPHead",
    "ICResNet",
    "ICResNetV1c",
    "ICResNetV1d",
    "PointwiseFuseASPPHead",
]

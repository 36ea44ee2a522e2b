"""Finds a checkpoint: a path, a URL, or a name of torchvision's or OpenMMLab's model zoos."""

import urllib.error
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_local_rank
from mmengine.runner import checkpoint as _mmengine

from mmbcn.errors import UsageError

URL_SCHEMES = ("http://", "https://")
ZOO_SCHEMES = ("torchvision://", "modelzoo://", "open-mmlab://", "openmmlab://", "mmcls://")
_ALSO_KNOWN_AS = {  # names that users try -> those of the zoo
    f"contrib/{net}_gn_ws": f"jhu/{net}_gn_ws"
    for net in ("resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d")
}


def fetch(source: str) -> Path:
    """The local file of ``source``; downloads once, into torch's cache, where it is not local.

    Args:
        source: a path, a URL, ``torchvision://NAME``, ``open-mmlab://NAME`` or ``mmcls://NAME``.

    Raises:
        UsageError: the zoo has no such name (says which are close), or the download failed.
    """
    scheme = next((s for s in ZOO_SCHEMES if source.startswith(s)), None)
    url = _zoo_url(scheme, source.removeprefix(scheme)) if scheme else source
    if not url.startswith(URL_SCHEMES):
        return Path(url).expanduser()
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if get_local_rank() == 0 and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (urllib.error.URLError, OSError) as error:
            raise UsageError(
                f"could not download {url} ({error}): download it by other means and give its "
                f"path, or put it at {path}"
            ) from error
    barrier()
    return path


def _zoo_url(scheme: str, name: str) -> str:
    if scheme == "mmcls://":
        urls = _mmengine.get_mmcls_models()
    elif scheme in ("torchvision://", "modelzoo://"):
        try:
            urls = _mmengine.get_torchvision_models()
        except ModuleNotFoundError:
            raise UsageError(
                f"{scheme}{name} needs torchvision, which knows the address: pip install "
                "torchvision, or download the file and give its path"
            ) from None
    else:
        urls = _mmengine.get_external_models()
        name = _mmengine.get_deprecated_model_names().get(name, name)
        name = _ALSO_KNOWN_AS.get(name, name)
    if name not in urls:
        same = [known for known in urls if Path(known).name == Path(name).name]
        close = same or get_close_matches(name, urls, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(scheme + known for known in close)}?" if close else ""
        raise UsageError(f"there is no checkpoint {scheme}{name}{hint}")
    return urls[name]

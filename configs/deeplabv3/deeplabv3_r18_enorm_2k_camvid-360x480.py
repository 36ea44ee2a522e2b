# Eight blocks are few enough to start with open branches, also without normalization
_base_ = "./deeplabv3_r18_bn_2k_camvid-360x480.py"
from mmbcn import set_norm

model = set_norm(_base_.model, "none")
model.backbone.zero_init_residual = False
custom_hooks = [*_base_.custom_hooks, dict(type="mmbcn.ENormHook")]

_base_ = __import__("mmpretrain").__path__[0] + "/.mim/configs/resnet/resnet50_8xb32_in1k.py"
from mmbcn import set_norm

model = set_norm(_base_.model, "bcn")

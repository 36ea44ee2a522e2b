_base_ = "./deeplabv3_r101_bcn_40k_cityscapes-512x1024.py"
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            *_base_.train_pipeline[:-1],
            dict(type="mmbcn.APRSingle"),
            _base_.train_pipeline[-1],
        ]
    )
)

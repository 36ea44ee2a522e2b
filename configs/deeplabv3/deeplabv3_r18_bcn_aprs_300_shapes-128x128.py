_base_ = "./deeplabv3_r18_bcn_300_shapes-128x128.py"
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            *_base_.train_pipeline[:-1],
            dict(type="mmbcn.APRSingle"),
            _base_.train_pipeline[-1],
        ]
    )
)

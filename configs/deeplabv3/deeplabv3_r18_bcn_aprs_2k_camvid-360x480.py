_base_ = "./deeplabv3_r18_bcn_2k_camvid-360x480.py"
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            *_base_.train_pipeline[:-1],
            dict(type="mmbcn.APRSingle"),
            _base_.train_pipeline[-1],
        ]
    )
)

# The authors' VOC schedule: 50 epochs at lr 0.007 for 16 images in all, poly 0.9 to zero
_base_ = "./40k.py"
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=0.007, momentum=0.9, weight_decay=1e-4)
)
param_scheduler = [
    dict(
        type="PolyLR",
        eta_min=0,
        power=0.9,
        begin=0,
        end=50,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=50, val_interval=10)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=True), checkpoint=dict(by_epoch=True, interval=10)
)

default_scope = "mmseg"
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl", timeout=600),  # seconds that a rank waits for the others
)
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
tta_model = dict(type="SegTTAModel")
# each rank has running estimates of its own: average them before validation and checkpoints
custom_hooks = [dict(type="mmbcn.SyncBuffersHook"), dict(type="mmbcn.NonFiniteHook")]

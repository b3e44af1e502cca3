"""Cnn14 with decision-level maximum on weak labels, trained as in PANNs (arXiv:1912.10211).

Balanced order, mixup, SpecAugment, binary cross-entropy, AMSGrad at 1e-3, batch 32 after mixup.
PANNs reports mAP 0.385 for this net and 0.431 for Cnn14 (clipwise pooling) on AudioSet's evaluation
set, full training set, 600 k steps.

    uss-jax train-tagger --config configs/tagger_cnn14.py --workdir runs/tagger \
        --config.data.records=/data/audioset/1.0.0
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.seed = 1234
    config.sample_rate = 32000
    config.segment_seconds = 2.0  # length of anchors for users of the net as detector
    config.total_steps = 600_000
    config.global_batch = 32  # after mixup, which reads twice as many clips

    config.data = ConfigDict()
    config.data.records = ""
    config.data.split = "full_train"
    config.data.order = "balanced"
    config.data.share = 1.0  # fraction of the clips used; larger fractions contain smaller ones
    config.data.clip_seconds = 10.0
    # Reader threads, one batch each. One reads 16 PCM clips from the page cache in 5 ms; four hide
    # a bucket's latency of 40 ms; more do no harm. Decoding FLAC takes 4 ms of a core per clip,
    # 1 ms per anchor.
    config.data.threads = 4
    config.data.workers = 0  # reader processes, for when threads are not enough
    config.data.class_weights = ConfigDict()  # class name -> draws per round; default 1
    config.data.max_corrupt = 0  # damaged records to report and replace before failing

    config.tagger = ConfigDict()
    config.tagger.net = "cnn14"
    config.tagger.n_fft = 1024
    config.tagger.hop_samples = 320
    config.tagger.mel_bins = 64
    config.tagger.f_min = 50.0
    config.tagger.f_max = 14000.0
    config.tagger.channels = (64, 128, 256, 512, 1024, 2048)
    config.tagger.classes = 527
    config.tagger.dtype = "float32"
    # Precision of float32 products and convolutions. NVIDIA GPUs: "default" and "high" are TF32
    # (PyTorch's default for convolutions), "highest" is float32. TPUs: 1, 3 and 6 bfloat16 passes.
    # By its maker's figures an H100 multiplies 7 times as fast at "default" as at "highest", a TPU
    # 6 times. On a CPU all are the same. Detection always runs at "highest", however the net was
    # trained.
    config.precision = "default"

    # Outputs to train: "clipwise" (decision-level maximum, for detection) or "tagging" (pooled over
    # time first, for conditions). A net trained on both serves both purposes.
    config.outputs = ("clipwise",)
    config.speed = None  # or arguments of change_speed in training/augment.py
    config.noise = None  # or arguments of add_noise in training/augment.py
    config.mixup_alpha = 1.0
    config.spec_augment = ConfigDict()
    config.spec_augment.time_width = 64
    config.spec_augment.time_stripes = 2
    config.spec_augment.mel_width = 8
    config.spec_augment.mel_stripes = 2

    config.norm_momentum = 0.1  # weight of a batch in the running statistics of batch norm
    config.optimizer = "adamw_amsgrad"  # or "adamw"
    config.weight_decay = 0.0
    config.clip_norm = 0.0  # maximum global norm of the gradient; 0 for no limit
    config.schedule = ConfigDict()
    config.schedule.name = "constant_warm_up"
    config.schedule.learning_rate = 1e-3
    config.schedule.warm_up_steps = 0

    # An update is skipped if the loss or gradient is NaN or infinite, or the gradient norm exceeds
    # `max_norm_ratio` times its running median (0 for no limit). `max_skipped_steps` skips in a row
    # stop the run.
    config.max_norm_ratio = 100.0
    config.max_skipped_steps = 10

    config.log_every_steps = 100
    config.checkpoint_every_steps = 10_000
    config.keep_checkpoints = 3
    # If the newest checkpoint is damaged: "set_aside" to resume from the one before, or "stop".
    config.damaged_checkpoint = "set_aside"
    # Bundle, workdir or converted checkpoint whose parameters a new run starts from; "" for none.
    config.init_from = ""
    config.init_partly = False  # take what has the same name and shape, else all must

    config.profile = ConfigDict()
    config.profile.steps = ()  # (first, last) steps to profile; the trace goes to the workdir
    return config

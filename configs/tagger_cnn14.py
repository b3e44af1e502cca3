"""Cnn14 with decision-level maximum on weak labels, trained as PANNs (arXiv:1912.10211).

Balanced order, mixup, SpecAugment, binary cross-entropy, AMSGrad at 1e-3, batch 32 after mixup.
PANNs reports mAP 0.385 for this net and 0.431 for Cnn14 (clipwise pooling) on AudioSet's evaluation
set, full training set, 600 k steps.

    uss-jax train-tagger --config configs/tagger_cnn14.py --workdir runs/tagger \
        --config.data.records=/data/audioset/1.0.0
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.seed = 1234
    config.sample_rate = 32000
    config.segment_seconds = 2.0  # of anchors, for those who use the net
    config.total_steps = 600_000
    config.global_batch = 32  # after mixup; twice as many clips are read

    config.data = ConfigDict()
    config.data.records = ""
    config.data.split = "full_train"
    config.data.order = "balanced"
    config.data.share = 1.0  # of the clips; a larger share holds those of a smaller one
    config.data.clip_seconds = 10.0
    # Threads that read, a batch each. One reads 16 clips of PCM in the page cache in 5 ms, and more
    # do no harm; four make up for a bucket that takes 40 ms to answer. Decoding FLAC takes 4 ms of
    # a core for a clip, 1 ms for an anchor.
    config.data.threads = 4
    config.data.workers = 0  # processes that read, where threads are not enough
    config.data.class_weights = ConfigDict()  # class name -> places a round; 1 if not said
    config.data.max_corrupt = 0  # so many damaged records are said and left out

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
    # Precision of float32 products and convolutions: "default" is TF32 on NVIDIA GPUs, PyTorch's
    # own choice for convolutions, and one bfloat16 pass on TPUs; "high" is TF32, or three passes;
    # "highest" is float32, or six passes. By its maker's figures an H100 multiplies 7 times as fast
    # at "default" as at "highest", a TPU 6 times. On a CPU they are the same. The net that detects
    # is always at the highest, however it was trained.
    config.precision = "default"

    # Which probabilities are trained: "clipwise" (decision-level maximum, for detection) and
    # "tagging" (pooled over time first, for conditions). With both, one net serves as both.
    config.outputs = ("clipwise",)
    config.speed = None  # or arguments of training/augment.py's change_speed
    config.noise = None  # or arguments of training/augment.py's add_noise
    config.mixup_alpha = 1.0
    config.spec_augment = ConfigDict()
    config.spec_augment.time_width = 64
    config.spec_augment.time_stripes = 2
    config.spec_augment.mel_width = 8
    config.spec_augment.mel_stripes = 2

    config.norm_momentum = 0.1  # weight of a batch in the running statistics
    config.optimizer = "adamw_amsgrad"  # or "adamw"
    config.weight_decay = 0.0
    config.clip_norm = 0.0  # greatest global norm of a gradient; 0 for any
    config.schedule = ConfigDict()
    config.schedule.name = "constant_warm_up"
    config.schedule.learning_rate = 1e-3
    config.schedule.warm_up_steps = 0

    # Updates are left out where loss or gradient is NaN or infinite, or the gradient longer than
    # `max_norm_ratio` times its running median (0 for no limit); `max_skipped_steps` of them in a
    # row stop the run.
    config.max_norm_ratio = 100.0
    config.max_skipped_steps = 10

    config.log_every_steps = 100
    config.checkpoint_every_steps = 10_000
    config.keep_checkpoints = 3
    # A newest checkpoint found damaged is set aside for the one before it; or "stop".
    config.damaged_checkpoint = "set_aside"

    config.profile = ConfigDict()
    config.profile.steps = ()  # (first, last): the profiler's trace of them goes to the workdir
    return config

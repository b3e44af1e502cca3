"""HTS-AT on weak labels, trained from scratch with the recipe of its paper (arXiv:2202.00874).

Balanced order, mixup, SpecAugment, binary cross-entropy, AdamW at 1e-3 with decay 0.05, gradients
clipped at 1.0, batch 128. The rate is scaled by 0.05, 0.1 and 0.2 in the first three epochs, and
halved after the tenth and twentieth; the authors' released configuration has 0.02, 0.05 and 0.1
instead. The authors blend inputs within a batch and leave the labels; here labels are blended too,
and twice the clips read. They report mAP 0.471 on AudioSet's evaluation set for a net that starts
from weights trained on images, which this recipe does not.

    uss-jax train-tagger --config configs/tagger_htsat.py --workdir runs/htsat \
        --config.data.records=/data/audioset/1.0.0
"""

from ml_collections import ConfigDict

EPOCH_STEPS = 15_600  # 2 M clips


def get_config() -> ConfigDict:
    """The config."""
    config = ConfigDict()
    config.seed = 1234
    config.sample_rate = 32000
    config.segment_seconds = 2.0  # of anchors, for those who use the net
    config.total_steps = 30 * EPOCH_STEPS
    config.global_batch = 128  # after mixup; twice as many clips are read

    config.data = ConfigDict()
    config.data.records = ""
    config.data.split = "full_train"
    config.data.order = "balanced"
    config.data.share = 1.0  # of the clips; a larger share holds those of a smaller one
    config.data.clip_seconds = 10.0
    config.data.class_weights = ConfigDict()  # class name -> places a round; 1 if not said
    config.data.max_corrupt = 0  # so many damaged records are said and left out
    # Threads that read, a batch each. One reads 16 clips of PCM in the page cache in 5 ms, and more
    # do no harm; four make up for a bucket that takes 40 ms to answer. Decoding FLAC takes 4 ms of
    # a core for a clip, 1 ms for an anchor.
    config.data.threads = 4
    config.data.workers = 0  # processes that read, where threads are not enough

    config.tagger = ConfigDict()
    config.tagger.net = "htsat"
    config.tagger.n_fft = 1024
    config.tagger.hop_samples = 320
    config.tagger.mel_bins = 64
    config.tagger.f_min = 50.0
    config.tagger.f_max = 14000.0
    config.tagger.image_size = 256
    config.tagger.token_width = 96  # 256 for embeddings of 2048
    config.tagger.depths = (2, 2, 6, 2)
    config.tagger.heads = (4, 8, 16, 32)
    config.tagger.classes = 527
    config.tagger.repeat_short = True  # clips that fit more than once; False stretches them
    config.tagger.stochastic_depth = 0.1
    config.tagger.dtype = "float32"
    # Precision of float32 products and convolutions: "default" is TF32 on NVIDIA GPUs, PyTorch's
    # own choice for convolutions, and one bfloat16 pass on TPUs; "high" is TF32, or three passes;
    # "highest" is float32, or six passes. By its maker's figures an H100 multiplies 7 times as fast
    # at "default" as at "highest", a TPU 6 times. On a CPU they are the same. The net that detects
    # is always at the highest, however it was trained.
    config.precision = "default"

    config.outputs = ("clipwise",)
    config.speed = None  # or arguments of training/augment.py's change_speed
    config.noise = None  # or arguments of training/augment.py's add_noise
    config.mixup_alpha = 0.5
    config.spec_augment = ConfigDict()
    config.spec_augment.time_width = 64
    config.spec_augment.time_stripes = 2
    config.spec_augment.mel_width = 8
    config.spec_augment.mel_stripes = 2

    config.norm_momentum = 0.1  # weight of a batch in the running statistics
    config.optimizer = "adamw"
    config.weight_decay = 0.05
    config.clip_norm = 1.0  # greatest global norm of a gradient; 0 for any
    config.schedule = ConfigDict()
    config.schedule.name = "stepped"
    config.schedule.learning_rate = 1e-3
    config.schedule.boundaries = tuple(epoch * EPOCH_STEPS for epoch in (1, 2, 11, 21))
    config.schedule.scales = (0.05, 0.1, 0.2, 0.1, 0.05)

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

"""Waveforms: files, resampling, spectrograms."""

# Hz. Of records, models and recordings; others are a damaged header or a mistake.
LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE = 1_000, 768_000

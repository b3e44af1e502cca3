"""Waveforms: files, resampling, spectrograms."""

# In Hz; applies to records, models and recordings. Other rates mean a damaged header or a mistake.
LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE = 1_000, 768_000

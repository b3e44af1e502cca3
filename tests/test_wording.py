from uss_jax.wording import counted


def test_one_and_many():
    assert counted(1, "file") == "1 file"
    assert counted(0, "file") == "0 files"
    assert counted(2, "class", "classes") == "2 classes"
    assert counted(1, "clip has", "clips have") == "1 clip has"
    assert counted(12345, "clip has", "clips have") == "12,345 clips have"

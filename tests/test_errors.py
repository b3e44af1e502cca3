from uss_jax.errors import UserError


def test_a_sentence_stays_one_line_whatever_the_input_holds():
    error = UserError("a\nb\r\x1b[31m\u2028c: é 狗 \udcff is no file")
    assert str(error) == "a\\nb\\r\\x1b[31m\\u2028c: é 狗 \udcff is no file"

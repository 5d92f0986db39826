"""Options that make no sense are refused at the start, by name."""

from retentive.serve.options import Options


def test_options_that_make_no_sense(refuses, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for options, words in (
        (dict(slots=0), "`slots=0`: must be above 0"),
        (dict(max_prompt=-1), "`max_prompt=-1`: must be above 0"),
        (dict(timeout=float("nan")), "`timeout=nan`: must be above 0"),
        (dict(state_precision="int4"), "unknown `state_precision` 'int4'"),
        (dict(cache=-1), "`cache=-1`: must be at least 0"),
        (dict(cors=("junk",)), "`cors='junk'`: expected * or an origin without path, https://example.org"),
        (dict(cors=("https://example.org/",)), "`cors='https://example.org/'`: expected * or an origin without path"),
        (dict(states=file), f"`states='{file}'`: a file; name a folder"),
        (dict(cache_folder=file), f"`cache_folder='{file}'`: a file; name a folder"),
        (dict(api_key=("",)), "`api_key` has a key that is empty or not printable ASCII"),
        (dict(api_key=("a\nb",)), "`api_key` has a key that is empty or not printable ASCII"),
    ):
        with refuses(words):
            Options(**options)


def test_keys_of_the_environment_are_let_in_too():
    options = Options(api_key=("a",), slots=3)
    assert options.with_environment_keys({"RETENTIVE_API_KEY": " b, c ,,"}) == Options(api_key=("a", "b", "c"), slots=3)
    assert options.with_environment_keys({}) == options


def test_origins_of_all_kinds_are_taken():
    for origin in ("*", "http://localhost:9142", "https://example.org", "chrome-extension://abcdef", "http://[::1]:80"):
        assert Options(cors=(origin,)).cors == (origin,)

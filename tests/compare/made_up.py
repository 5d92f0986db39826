"""Records as runs leave them, with made-up numbers."""

HARDWARE = {"cpu": "a", "threads": 1, "gpu": "none"}


def record(variant, bits, *, size="1m", seed=0, lr=1e-3, parameters=10**6, **more):
    part = {"tokens": 10, "loss": bits + 3}
    return {
        "variant": variant, "size": size, "seed": seed, "lr": lr, "name": f"{variant}{seed}",
        "parameters": parameters, "block_parameters": parameters, "tokens": 1000, "bits_per_byte": bits,
        "recalled": part, "others": part, "tokens_per_second": 100.0 + seed, "memory": 10**9,
        "curve": [[500, bits + 1], [1000, bits]], "hardware": HARDWARE, "about": {"train": {}}, **more,
    }  # fmt: skip

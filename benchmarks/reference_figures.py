"""What the public R2GenCMN code took on ANOTHER machine: 2 cores (AVX2, no AVX-512), float32, torch 2.15, nothing else
running, the sizes of run_iu_xray.sh (ResNet-101, 224 px, 2 views, length 60, beam 3, 760 words). One run each after a
warm-up, good to some 10 %. Its matrix product of 2048 x 2048 made 150 GFLOP/s: that is what machines are compared by.
"""

PRODUCT_FLOPS = 150e9
# By benchmark: what was timed, and its seconds.
SECONDS = {
    "train_step": {
        "training step, batch 16 (32 images)": 27.7,
        "of it: visual forward": 5.69,
        "of it: encoder-decoder forward": 1.84,
        "of it: backward of both": 20.01,
        "of it: optimiser": 0.15,
    },
    "generate": {"beam search per study, batch 16, beam 3, 60 tokens, features given": 6.43},
    "evaluate": {"METEOR of 590 reports, start included": 12.3, "CIDEr": 0.41, "ROUGE-L": 0.22, "BLEU": 0.18},
}
TRAINING_PEAK_MIB = 13.4e9 / 2**20


def print_reference(benchmark: str) -> None:
    """The figures that go with a benchmark, with the products of matrices that the other machine could have made."""
    rate = f"{PRODUCT_FLOPS / 1e9:.0f} GFLOP/s"
    print(f"\npublic R2GenCMN code on ANOTHER machine (2 cores, wall clock, AVX2, matrix product {rate})")
    for name, seconds in SECONDS[benchmark].items():
        print(f"{name:<70}{seconds:8.2f} s ={seconds * PRODUCT_FLOPS / 1e12:9.3f} TFLOP of matrix products")
    if benchmark == "train_step":
        print(f"peak memory of the training step: {TRAINING_PEAK_MIB:,.0f} MiB")

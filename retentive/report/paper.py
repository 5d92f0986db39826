"""What the paper and others report, as Markdown tables, each with its place. Figures, cited; nothing here is ours.

[v4] is arXiv 2307.08621v4; [2024] the anonymous resubmission of the same paper to NeurIPS 2024.
"""

SCALING = """
[v4, Figure 5] is a plot without a table: validation perplexity of 1.3B, 2.7B and 6.7B models after 100 B tokens. The
Transformer is slightly better at 1.3B, RetNet from 2.7B on (about 12.8 against 13.0 at 6.7B, read off the plot).

Independent replications (GLA, arXiv 2312.06635, table 2; perplexity on WikiText, fla's code, SlimPajama):

| size, tokens | Transformer++ | RetNet | Mamba | GLA |
| --- | ---: | ---: | ---: | ---: |
| 340M, 15 B | 28.39 | 32.33 | 28.39 | 28.65 |
| 1.3B, 100 B | 16.85 | 18.64 | 17.06 | 17.22 |
"""

ABLATIONS = """
[v4, Table 6], 200M models, 10k steps of 0.5 M tokens, perplexity:

| | in-domain | PG22 | QMSum | GovReport | SummScreen |
| --- | ---: | ---: | ---: | ---: | ---: |
| RetNet | 26.05 | 45.27 | 21.33 | 16.52 | 22.48 |
| without the swish gate | 27.84 | 49.44 | 22.52 | 17.45 | 23.72 |
| without GroupNorm | 27.54 | 46.95 | 22.61 | 17.59 | 23.73 |
| without decay | 27.86 | 47.85 | 21.99 | 17.49 | 23.70 |
| one decay for all heads (127/128) | 27.02 | 47.18 | 22.08 | 17.17 | 23.38 |
| smaller heads (64, 128) | 27.68 | 47.72 | 23.09 | 17.46 | 23.41 |
"""

OTHERS = """
[v4, Table 5], 200M models, 10k steps of 0.5 M tokens, perplexity:

| | in-domain | PG22 | QMSum | GovReport | SummScreen |
| --- | ---: | ---: | ---: | ---: | ---: |
| RWKV | 30.92 | 51.41 | 28.17 | 19.80 | 25.78 |
| H3 | 29.97 | 49.17 | 24.29 | 19.19 | 25.11 |
| Hyena | 32.08 | 52.75 | 28.18 | 20.55 | 26.51 |
| Linear Transformer | 40.24 | 63.86 | 28.45 | 25.33 | 32.02 |
| RetNet | 26.05 | 45.27 | 21.33 | 16.52 | 22.48 |
"""

CONTEXTS = """
[2024, Table 6], perplexity of the last 128 tokens by length of context:

| | 512 | 1024 | 2048 |
| --- | ---: | ---: | ---: |
| Transformer | 13.55 | 12.56 | 12.35 |
| RetNet | 13.09 | 12.14 | 11.98 |
"""

TASKS = """
[v4, Table 3], 6.7B models, accuracy in per cent:

| | HellaSwag | BoolQ | COPA | PIQA | Winograd | Winogrande | StoryCloze | mean |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 0-shot, Transformer | 55.9 | 62.0 | 69.0 | 74.6 | 69.5 | 56.5 | 75.0 | 66.07 |
| 0-shot, RetNet | 60.7 | 62.2 | 77.0 | 75.4 | 77.2 | 58.1 | 76.0 | 69.51 |
| 4-shot, Transformer | 55.8 | 58.7 | 71.0 | 75.0 | 71.9 | 57.3 | 75.4 | 66.44 |
| 4-shot, RetNet | 60.5 | 60.1 | 78.0 | 76.0 | 77.9 | 59.9 | 75.9 | 69.76 |
"""

TRAINING = """
[v4, Table 4: training cost], 8 x A100-80GB, 8,192 tokens; the Transformer's middle column is with FlashAttention:

| size | memory (GB): Transformer / Flash / RetNet | words per second: Transformer / Flash / RetNet |
| --- | ---: | ---: |
| 1.3B | 74.8 / 38.8 / 34.5 | 10,832 / 63,965 / 73,345 |
| 2.7B | 69.6 / 42.1 / 42.0 | 5,186 / 34,990 / 38,921 |
| 6.7B | 69.0 / 51.4 / 48.0 | 2,754 / 16,230 / 17,459 |
| 13B | 61.4 / 46.3 / 45.9 | 1,209 / 7,945 / 8,642 |
"""

DECODING = """
[v4, Figure 6 and abstract], 6.7B, A100-80GB, 8k tokens of context: 8.4 times the throughput, 3.4 times less memory and
15.6 times lower latency than a Transformer with a KV cache.
"""

RECALL = """
The paper has no test of recall; its 2024 version reports SQuAD and WebQS, 67.7 and 36.4 for the Transformer, 72.7 and
40.4 for RetNet. Independent (DeltaNet, arXiv 2406.06484, Table 1), 1.3B:

| | SWDE | SQuAD | FDA |
| --- | ---: | ---: | ---: |
| Transformer++ | 66.6 | 31.5 | 27.4 |
| RetNet | 42.8 | 34.7 | 14.3 |
"""

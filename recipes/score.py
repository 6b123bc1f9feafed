"""Score a file of requests of many domains on one base, and measure the swap of a bundle.

The steps are in llmrec_peft/recipes/score.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/score.py \
    --bundles '{movies: out/movies/bundle, shop: out/shop/bundle}' --items '{movies: DIR, shop: DIR}' \
    --requests requests.jsonl --output predictions.jsonl
"""

from llmrec_peft.cli import launcher

main = launcher("score")

if __name__ == "__main__":
    main()

"""Score a file of requests of many domains on one base, and see what swapping a domain's bundle costs.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/score.py \
    --bundles '{movies: out/movies/bundle, shop: out/shop/bundle}' --items '{movies: DIR, shop: DIR}' \
    --requests requests.jsonl --output answers.jsonl
"""

from llmrec_peft.config.schema import ScoreConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(ScoreConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.score import score

        score(config)


if __name__ == "__main__":
    main()

"""Evaluate a trained bundle or a merged model, by streams or by one independent prompt per target.

The steps are in llmrec_peft/recipes/evaluate.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/evaluate.py \
    --bundle OUT/bundle --data.path DIR --mode stream
"""

from llmrec_peft.cli import launcher

main = launcher("evaluate")

if __name__ == "__main__":
    main()

# GKD with ms-swift: eight processes, a teacher with the student's tokenizer.
NPROC_PER_NODE=8 \
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
swift rlhf \
    --rlhf_type gkd \
    --model Qwen/Qwen3-0.6B \
    --teacher_model Qwen/Qwen3-4B \
    --tuner_type full \
    --dataset data/tasks.jsonl \
    --seq_kd false \
    --lmbda 0.5 \
    --beta 1 \
    --temperature 1.0 \
    --sft_alpha 0.1 \
    --gkd_logits_topk 64 \
    --torch_dtype bfloat16 \
    --max_steps 400 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-5 \
    --warmup_ratio 0.05 \
    --max_completion_length 1024 \
    --save_steps 100 \
    --save_total_limit 2 \
    --output_dir output/gkd \
    --deepspeed zero3

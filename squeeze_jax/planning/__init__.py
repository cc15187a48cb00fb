"""What a pod run will need and take, asked of the TPU's compiler."""

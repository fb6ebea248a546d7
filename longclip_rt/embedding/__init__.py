"""What `longclip-rt embed` is made of: inputs, decoding beside encoding, shards that outlive a kill, outputs."""

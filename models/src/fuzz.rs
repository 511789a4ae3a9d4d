//! Bodies of the fuzz targets under `models/fuzz`, callable from ordinary tests: each takes any bytes and holds what must be true
//! of them.

use crate::{FfnKind, TensorId, checkpoint, limits, parse_config};

/// `config.json` of any content: a refusal, or a spec whose promises hold.
pub fn config(bytes: &[u8]) {
    // The same bytes as the other file must do no harm either.
    let _ = parse_config(br#"{"model_type": "mixtral"}"#, Some(bytes));
    let Ok((spec, _)) = parse_config(bytes, None) else {
        return;
    };
    assert!(spec.heads.is_multiple_of(spec.kv_heads));
    assert!(spec.head_dim.is_multiple_of(2));
    assert!((1..=spec.experts).contains(&spec.top_k));
    assert!((1..=limits::LAYERS_MAX).contains(&spec.layers.len()));
    assert!(
        spec.layers
            .iter()
            .any(|layer| layer.ffn == FfnKind::Experts)
    );
    for id in [TensorId::Embedding, TensorId::FinalNorm, TensorId::Head] {
        assert!(id.shape(&spec).is_some());
    }
    for id in TensorId::all(&spec).take(10_000) {
        let (rows, cols) = id.shape(&spec).unwrap_or((0, 0));
        assert!(rows > 0 && cols > 0 && rows.checked_mul(cols).is_some_and(|n| n <= 1 << 44));
    }
}

/// A safetensors file of any content: a refusal, or tensors that lie within it and cover it.
pub fn safetensors(bytes: &[u8]) {
    let Ok(covered) = checkpoint::covered_bytes("fuzz", bytes) else {
        return;
    };
    assert!(covered <= bytes.len());
    // Whatever we read, the format's own library reads.
    assert!(safetensors::SafeTensors::deserialize(bytes).is_ok());
}

//! The tiny models of `integration/fixtures`, as the Python script `make_models.py` wrote them.

use std::path::PathBuf;

use volley_models::{DenseTensor, ExpertTensor, LoadFormat, ModelDir, TensorId};

const NAMES: [&str; 3] = ["tiny-mixtral", "tiny-qwen3moe", "tiny-dbrx"];

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures")
}

fn open(name: &str) -> ModelDir {
    ModelDir::open(fixtures().join("models").join(name), LoadFormat::Auto).unwrap()
}

#[test]
fn every_tensor_of_every_fixture_has_its_shape() {
    for name in NAMES {
        let model = open(name);
        assert_eq!(model.name(), name);
        let weights = model.weights();
        for id in TensorId::all(model.spec()) {
            let view = weights.tensor(id).unwrap();
            assert_eq!(
                Some((view.rows, view.cols)),
                id.shape(model.spec()),
                "{name} {id:?}"
            );
            assert_eq!(view.to_f32().len(), view.rows * view.cols);
        }
    }
}

//! The demo model inside the program: a small Mixtral trained on Shakespeare, so that everything can be tried without a download.

use std::borrow::Cow;

use volley_models::{ModelDir, ModelError, ModelParts, WeightBytes};

/// What it is called in the API.
pub const NAME: &str = "volley-demo";

/// Opens it.
///
/// # Errors
/// As [`ModelDir::from_parts`]; a test rules them out.
pub fn model_dir() -> Result<ModelDir, ModelError> {
    ModelDir::from_parts(ModelParts {
        name: NAME.to_owned(),
        config: Cow::Borrowed(include_bytes!("../../models/demo/config.json")),
        generation_config: Some(Cow::Borrowed(include_bytes!(
            "../../models/demo/generation_config.json"
        ))),
        tokenizer: Some(Cow::Borrowed(include_bytes!(
            "../../models/demo/tokenizer.json"
        ))),
        tokenizer_config: Some(Cow::Borrowed(include_bytes!(
            "../../models/demo/tokenizer_config.json"
        ))),
        chat_template: None,
        weights: WeightBytes::Static(include_bytes!("../../models/demo/model.safetensors")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_model_opens_and_has_all_it_needs() {
        let model = model_dir().unwrap();
        assert_eq!(model.spec().experts, 8);
        let tokenizer = model.tokenizer().unwrap();
        let ids = tokenizer.encode("ROMEO:\nBut soft", true).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ROMEO:\nBut soft");
        model.chat_template().unwrap();
    }
}

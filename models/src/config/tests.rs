//! What each key means, wherever our reading could differ from transformers'.
use super::*;

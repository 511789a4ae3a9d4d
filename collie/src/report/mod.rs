//! Reports: what was found, in plain words, and how strategies compare. In Markdown and as pages of HTML that need nothing beside them.

mod advice;
mod html;
mod markdown;
mod plot;

pub use html::anomalies_html;
pub use markdown::{anomalies_markdown, evaluation_markdown};
pub use plot::evaluation_svg;

//! First come, first served.

use std::time::Duration;

use super::{Order, Standing};
use crate::SequenceView;
use crate::View;
use crate::protocol::{Now, SequenceId};

/// By arrival, whoever asks for whatever.
#[derive(Debug, Clone, Copy, Default)]
pub struct Arrival;

impl Order for Arrival {
    fn standing(&self, sequence: SequenceId, _: &SequenceView) -> Standing {
        let key = Duration::ZERO;
        Standing { key, sequence }
    }

    /// They come in order of arrival.
    fn line_up(&mut self, _: &View, _: &mut [SequenceId], _: Now) {}
}

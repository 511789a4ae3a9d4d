//! How a worker is heard, wherever it runs.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use volley_transports::{Epoch, WorkerId};

use crate::data_loop::Exit;
use crate::protocol::AttentionWord;
use crate::startup::Startup;
use crate::waits::WorkerWait;

/// What a worker says to whoever looks after it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum WorkerWord {
    /// It has its weights; an expert worker names the experts it holds. Said again when that changes.
    Loaded(Vec<u16>),
    /// An attention worker is in a new epoch.
    Moved(Epoch),
    /// A peer is gone, silent or wrong.
    Accused {
        /// The accuser's epoch.
        epoch: Epoch,
        /// Who.
        peer: WorkerId,
        /// What it did.
        reason: String,
    },
    /// What it waits for, since it was asked.
    Waits(Vec<WorkerWait>),
    /// How its start went.
    Startup(Startup),
    /// Its thread has ended.
    Ended(Exit),
}

/// Whoever listens: the actors of this process, or a link to those of another.
pub(crate) trait Ear: Send + Sync {
    /// Hears a word of a worker's incarnation.
    fn word(&self, worker: WorkerId, life: u64, word: WorkerWord);

    /// Hears a report; one that is given back has to be said again later.
    fn report(&self, word: AttentionWord) -> Option<AttentionWord>;
}

/// One incarnation's voice.
#[derive(Clone)]
pub(crate) struct Voice {
    worker: WorkerId,
    life: u64,
    ear: Arc<dyn Ear>,
}

impl Voice {
    pub(crate) fn new(worker: WorkerId, life: u64, ear: Arc<dyn Ear>) -> Self {
        Voice { worker, life, ear }
    }

    pub(crate) fn say(&self, word: WorkerWord) {
        self.ear.word(self.worker, self.life, word);
    }

    pub(crate) fn accuse(&self, epoch: Epoch, peer: WorkerId, reason: String) {
        self.say(WorkerWord::Accused {
            epoch,
            peer,
            reason,
        });
    }

    pub(crate) fn report(&self, word: AttentionWord) -> Option<AttentionWord> {
        self.ear.report(word)
    }
}

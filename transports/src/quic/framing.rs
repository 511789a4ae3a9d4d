//! Messages in a stream of bytes: a length (u32, little-endian), then as many bytes. No I/O: bytes are put in as they come, in pieces of any size.

/// Longest control message, in bytes.
pub const CONTROL_MESSAGE_MAX: usize = 64 << 20;
/// What a message's buffer grows by: memory follows what has come, not what was announced.
const GROWTH: usize = 64 << 10;
/// Bytes of the length.
const HEAD: usize = 4;

/// A message longer than [`CONTROL_MESSAGE_MAX`] was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overlong(pub(super) u64);

/// Where a reader is in its stream.
#[derive(Debug, Default)]
pub(super) struct Framing {
    head: [u8; HEAD],
    head_len: usize,
    body: Vec<u8>,
    body_len: usize,
}

/// The length that goes before a message. None if it is longer than [`CONTROL_MESSAGE_MAX`].
pub(super) fn head(message: &[u8]) -> Option<[u8; HEAD]> {
    let len = u32::try_from(message.len()).ok()?;
    (message.len() <= CONTROL_MESSAGE_MAX).then(|| len.to_le_bytes())
}

impl Framing {
    /// Where the next bytes go; never empty.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.head_len < HEAD {
            return &mut self.head[self.head_len..];
        }
        if self.body_len == self.body.len() {
            let len = self.announced().min(self.body_len + GROWTH);
            self.body.resize(len, 0);
        }
        &mut self.body[self.body_len..]
    }

    /// So many bytes were put into the room: the message they complete, if they do.
    ///
    /// # Errors
    /// They announce a message that is too long. Nothing more can be read.
    pub(super) fn filled(&mut self, count: usize) -> Result<Option<Vec<u8>>, Overlong> {
        if self.head_len < HEAD {
            self.head_len += count;
        } else {
            self.body_len += count;
        }
        if self.head_len < HEAD {
            return Ok(None);
        }
        let len = self.announced();
        if len > CONTROL_MESSAGE_MAX {
            return Err(Overlong(len as u64));
        }
        if self.body_len < len {
            return Ok(None);
        }
        (self.head_len, self.body_len) = (0, 0);
        Ok(Some(std::mem::take(&mut self.body)))
    }

    /// Whether a message has begun and not ended.
    pub(super) fn is_within(&self) -> bool {
        self.head_len > 0
    }

    fn announced(&self) -> usize {
        u32::from_le_bytes(self.head) as usize
    }
}

/// Reads `bytes`, which come in pieces of `piece` bytes: how many messages there are, and whether they end in order. Panics if more memory is held than what came asks
/// for, or if a message read is not one written. For fuzzing from outside.
#[doc(hidden)]
pub fn read_messages(bytes: &[u8], piece: usize) -> (usize, bool) {
    let mut framing = Framing::default();
    let (mut messages, mut read, mut ends) = (0, 0, 0);
    while read < bytes.len() {
        let room = framing.room();
        assert!(!room.is_empty(), "there is no way on");
        let count = room.len().min(piece.max(1)).min(bytes.len() - read);
        room[..count].copy_from_slice(&bytes[read..read + count]);
        read += count;
        match framing.filled(count) {
            Ok(Some(message)) => {
                let written = &bytes[ends..read];
                assert_eq!(head(&message).as_ref().map(|h| &h[..]), written.get(..HEAD));
                assert_eq!(Some(&message[..]), written.get(HEAD..));
                (messages, ends) = (messages + 1, read);
            }
            Ok(None) => {}
            Err(Overlong(len)) => {
                assert!(len > CONTROL_MESSAGE_MAX as u64);
                return (messages, false);
            }
        }
        assert!(framing.body.len() <= read - ends + GROWTH);
    }
    (messages, !framing.is_within())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_read_back_whatever_the_pieces(
            lens in prop::collection::vec(prop_oneof![0..20usize, 0..200_000usize], 0..6),
            piece in 1..100_000usize,
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = Vec::new();
            for (i, &len) in lens.iter().enumerate() {
                let message = vec![i as u8; len];
                bytes.extend(head(&message).unwrap());
                bytes.extend(message);
            }
            prop_assert_eq!(read_messages(&bytes, piece), (lens.len(), true));
            // Cut off anywhere: no more messages than are whole.
            let cut = cut.index(bytes.len() + 1);
            let (whole, _) = read_messages(&bytes[..cut], piece);
            let mut ends = lens.iter().scan(0, |end, len| { *end += HEAD + len; Some(*end) });
            prop_assert_eq!(whole, ends.by_ref().take_while(|&end| end <= cut).count());
        }

        #[test]
        fn no_bytes_panic_or_take_memory(bytes in prop::collection::vec(any::<u8>(), 0..4096), piece in 1..64usize) {
            read_messages(&bytes, piece);
        }
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_at_its_length() {
        let bytes = (CONTROL_MESSAGE_MAX as u32 + 1).to_le_bytes();
        assert_eq!(read_messages(&bytes, 4), (0, false));
        assert_eq!(head(&vec![0; CONTROL_MESSAGE_MAX + 1]), None);
        // As long as is allowed takes no memory until it comes.
        let bytes = (CONTROL_MESSAGE_MAX as u32).to_le_bytes();
        assert_eq!(read_messages(&bytes, 1), (0, false));
    }
}

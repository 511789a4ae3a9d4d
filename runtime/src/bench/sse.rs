//! Server-sent events out of chunks of bytes, as far as OpenAI-compatible servers use them.

/// Longest event; a server that sends more speaks another language.
const EVENT_BYTES_MAX: usize = 16 << 20;

/// Cuts a stream of bytes into the `data` of its events, wherever the chunks begin and end.
#[derive(Debug, Default)]
pub(super) struct SseParser {
    buffer: Vec<u8>,
    data: Vec<u8>,
}

/// A stream that is no event stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an event of more than {EVENT_BYTES_MAX} bytes")]
pub(super) struct TooLong;

impl SseParser {
    /// Takes a chunk in and hands each event that is complete now to `event`.
    pub(super) fn push(
        &mut self,
        chunk: &[u8],
        mut event: impl FnMut(&[u8]),
    ) -> Result<(), TooLong> {
        self.buffer.extend_from_slice(chunk);
        let mut begin = 0;
        while let Some(length) = self.buffer[begin..].iter().position(|byte| *byte == b'\n') {
            let line = &self.buffer[begin..begin + length];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            begin += length + 1;
            if line.is_empty() {
                if !self.data.is_empty() {
                    event(&self.data);
                    self.data.clear();
                }
            } else if let Some(data) = line.strip_prefix(b"data:") {
                if !self.data.is_empty() {
                    self.data.push(b'\n');
                }
                self.data
                    .extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            }
        }
        self.buffer.drain(..begin);
        if self.buffer.len() + self.data.len() > EVENT_BYTES_MAX {
            Err(TooLong)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let mut parser = SseParser::default();
        let mut all = Vec::new();
        for chunk in chunks {
            parser
                .push(chunk, |data| {
                    all.push(String::from_utf8_lossy(data).into_owned())
                })
                .unwrap();
        }
        all
    }

    const STREAM: &[u8] = b": hello\n\ndata: {\"a\":1}\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]\n\ndata: cut off";

    #[test]
    fn comments_fields_and_line_ends_are_understood() {
        assert_eq!(events(&[STREAM]), ["{\"a\":1}", "two\nlines", "[DONE]"]);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_where_chunks_end(cuts in proptest::collection::vec(0..STREAM.len(), 0..6)) {
            let mut cuts = cuts;
            cuts.sort();
            let mut begin = 0;
            let mut chunks = Vec::new();
            for cut in cuts.into_iter().chain([STREAM.len()]) {
                chunks.push(&STREAM[begin..cut]);
                begin = cut;
            }
            prop_assert_eq!(events(&chunks), events(&[STREAM]));
        }
    }
}

//! Finding the first stop string in a text that comes in pieces.

/// Passes a text through up to the first stop string.
///
/// The first one is that which ends first; of two that end together, the longer. So the outcome does not depend on how the text is cut into pieces.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far, as far as it may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Looks for any of `stops`. Empty ones are passed over.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        StopStrings {
            stops,
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes a piece and returns the text that is certain to come before any stop string. After the first stop string everything is swallowed.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        let certain = match self.first_stop() {
            Some(start) => {
                self.stopped = true;
                start
            }
            None => self.held.len() - self.beginning_of_a_stop(),
        };
        let rest = self.held.split_off(certain);
        let text = std::mem::replace(&mut self.held, rest);
        if self.stopped {
            self.held.clear();
        }
        text
    }

    /// The end of the text: what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Where the first stop string begins.
    fn first_stop(&self) -> Option<usize> {
        self.stops
            .iter()
            .filter_map(|stop| {
                self.held
                    .find(stop.as_str())
                    .map(|start| (start + stop.len(), start))
            })
            .min()
            .map(|(_, start)| start)
    }

    /// Length in bytes of the longest end of the text that begins a stop string.
    fn beginning_of_a_stop(&self) -> usize {
        let held = self.held.as_bytes();
        let begun = |stop: &String| {
            let stop = stop.as_bytes();
            (1..stop.len().min(held.len() + 1))
                .rev()
                .find(|&length| held.ends_with(&stop[..length]))
        };
        // A partial character cannot match: the first byte of a character differs from all later ones, and `held` ends with a whole one.
        self.stops.iter().filter_map(begun).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run<'a>(stops: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> (String, bool) {
        let mut strings = StopStrings::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut text: String = pieces
            .into_iter()
            .map(|piece| strings.push(piece))
            .collect();
        text += &strings.finish();
        (text, strings.stopped())
    }

    #[test]
    fn a_stop_string_across_pieces_is_cut_off_with_all_that_follows() {
        assert_eq!(run(&["END"], ["a E", "N", "D b"]), ("a ".into(), true));
        assert_eq!(
            run(&["END"], ["a E", "N", "d b"]),
            ("a ENd b".into(), false)
        );
        assert_eq!(run(&["END"], ["a EN"]), ("a EN".into(), false));
    }

    #[test]
    fn the_one_that_ends_first_wins() {
        assert_eq!(run(&["xabc", "ab"], ["xabcd"]), ("x".into(), true));
        assert_eq!(run(&["xab", "ab"], ["xabcd"]), (String::new(), true));
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let mut strings = StopStrings::new(vec!["\n\n".into()]);
        assert_eq!(strings.push("a\n"), "a");
        assert_eq!(strings.push("b"), "\nb");
        assert_eq!(strings.push("\n\nc"), "");
        assert_eq!(strings.push("d"), "");
        assert!(strings.stopped());
    }

    proptest! {
        /// Against the definition, one character at a time.
        #[test]
        fn any_split_gives_the_text_before_the_first_stop_string(
            text in "[aböx]{0,24}",
            stops in prop::collection::vec("[aböx]{1,4}", 0..4),
            cuts in prop::collection::vec(0usize..24, 0..8),
        ) {
            let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
            let cut = ends.filter_map(|end| {
                stops.iter().filter(|stop| text[..end].ends_with(stop.as_str())).map(|stop| end - stop.len()).min()
            }).next();
            let expected = (text[..cut.unwrap_or(text.len())].to_owned(), cut.is_some());

            let mut borders: Vec<usize> = cuts.into_iter().filter(|&at| at <= text.len() && text.is_char_boundary(at)).collect();
            borders.extend([0, text.len()]);
            borders.sort_unstable();
            let pieces = borders.windows(2).map(|pair| &text[pair[0]..pair[1]]);
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, pieces), expected);
        }
    }
}

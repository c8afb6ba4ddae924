//! Added tokens: texts that are one token wherever they stand, and where a text is cut before anything else.

/// A set of added tokens, ready to be looked for.
#[derive(Debug, Default)]
pub struct Added {
    /// By first byte: content and id, the longest first.
    by_first: Vec<Vec<(Box<str>, u32)>>,
}

impl Added {
    /// A set of tokens by content and id; an empty content is never found.
    #[must_use]
    pub fn new(tokens: Vec<(String, u32)>) -> Self {
        if tokens.is_empty() {
            return Self::default();
        }
        let mut by_first: Vec<Vec<(Box<str>, u32)>> = vec![Vec::new(); 256];
        for (content, id) in tokens {
            if let Some(&first) = content.as_bytes().first() {
                by_first[usize::from(first)].push((content.into_boxed_str(), id));
            }
        }
        for found in &mut by_first {
            found.sort_by_key(|(content, _)| std::cmp::Reverse(content.len()));
        }
        Self { by_first }
    }

    /// The first token in `text`, the longest of those that start there: its place, its length in bytes, its id.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<(usize, usize, u32)> {
        if self.by_first.is_empty() {
            return None;
        }
        let bytes = text.as_bytes();
        bytes.iter().enumerate().find_map(|(place, &first)| {
            let candidates = &self.by_first[usize::from(first)];
            let fits = candidates.iter().find(|(content, _)| bytes[place..].starts_with(content.as_bytes()));
            fits.map(|(content, id)| (place, content.len(), *id))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Added;

    #[test]
    fn the_leftmost_and_there_the_longest_is_found() {
        let added = Added::new(vec![("<a>".into(), 1), ("<a><b>".into(), 2), ("b".into(), 3), (String::new(), 4)]);
        assert_eq!(added.find("x<a>b"), Some((1, 3, 1)));
        assert_eq!(added.find("x<a><b>"), Some((1, 6, 2)));
        assert_eq!(added.find("b<a>"), Some((0, 1, 3)));
        assert_eq!(added.find("\u{4f60}<a>"), Some((3, 3, 1)));
        assert_eq!(added.find("<a"), None);
        assert_eq!(Added::new(Vec::new()).find("<a>"), None);
    }
}

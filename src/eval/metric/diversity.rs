//! Distinct-1/2/3: the variety of a prompt's continuations.

use std::collections::{HashMap, HashSet};

/// Distinct-1, distinct-2 and distinct-3 of one prompt's continuations, `[k][tokens]`.
///
/// Distinct-n is the number of different n-grams divided by the number of tokens, as in section 3 of
/// arXiv 2406.16235 and its code. The denominator is the same for every n, so a text of m tokens has at
/// most (m - 1)/m for n = 2. The continuations share one set of n-grams; no n-gram spans two
/// continuations. Empty tokens are skipped, as that code skips special tokens. `None` without a token.
///
/// That code joins the tokens of an n-gram with `_`, so it counts `a_b c` and `a b_c` once. Here they
/// are two n-grams.
pub fn distinct<T: AsRef<str>>(continuations: &[&[T]]) -> Option<[f64; 3]> {
    // Tokens are numbered. An n-gram is an array of three numbers, padded with `NONE` at the front.
    const NONE: usize = usize::MAX;
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut sets: [HashSet<[usize; 3]>; 3] = Default::default();
    let mut n_tokens = 0;
    for &tokens in continuations {
        let mut before = [NONE; 2];
        for token in tokens.iter().map(AsRef::as_ref).filter(|token| !token.is_empty()) {
            let n_known = numbers.len();
            let number = *numbers.entry(token).or_insert(n_known);
            sets[0].insert([NONE, NONE, number]);
            if before[1] != NONE {
                sets[1].insert([NONE, before[1], number]);
            }
            if before[0] != NONE {
                sets[2].insert([before[0], before[1], number]);
            }
            before = [before[1], number];
            n_tokens += 1;
        }
    }
    (n_tokens > 0).then(|| sets.map(|set| set.len() as f64 / n_tokens as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Vec<&str> {
        text.split(' ').collect()
    }

    #[test]
    fn distinct_matches_values_computed_by_hand() {
        // "a b a" and "a b": 5 tokens; {a, b}; {ab, ba}; {aba}. So 2/5, 2/5, 1/5.
        assert_eq!(distinct(&[&tokens("a b a"), &tokens("a b")]), Some([0.4, 0.4, 0.2]));
    }

    #[test]
    fn no_n_gram_spans_two_continuations() {
        // "a b" and "c d": 4 tokens, pairs ab and cd but not bc, no triple.
        assert_eq!(distinct(&[&tokens("a b"), &tokens("c d")]), Some([1.0, 0.5, 0.0]));
    }

    #[test]
    fn the_denominator_is_the_same_for_every_n() {
        // "a b c": 3 tokens, 3 unigrams, 2 pairs, 1 triple.
        assert_eq!(distinct(&[&tokens("a b c")]), Some([1.0, 2.0 / 3.0, 1.0 / 3.0]));
    }

    #[test]
    fn empty_tokens_do_not_count() {
        assert_eq!(distinct(&[&["a", "", "b"]]), Some([1.0, 0.5, 0.0]));
        assert_eq!(distinct::<&str>(&[&[""], &[]]), None);
        assert_eq!(distinct::<&str>(&[]), None);
    }

    #[test]
    fn an_underscore_in_a_token_does_not_merge_n_grams() {
        assert_eq!(distinct(&[&["a_b", "c"], &["a", "b_c"]]), Some([1.0, 0.5, 0.0]));
    }

    #[test]
    fn doubling_the_continuations_halves_distinct() {
        let once = distinct(&[&tokens("a b c d")]).unwrap();
        let twice = distinct(&[&tokens("a b c d"), &tokens("a b c d")]).unwrap();
        for (once, twice) in once.iter().zip(twice) {
            assert!((once / 2.0 - twice).abs() < 1e-15);
        }
    }
}

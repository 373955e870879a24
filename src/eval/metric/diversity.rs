//! Distinct-1/2/3: how varied a prompt's continuations are.

use std::collections::{HashMap, HashSet};

/// Distinct-1, distinct-2 and distinct-3 of one prompt's continuations, `[k][tokens]`; `None` without a
/// token.
///
/// Distinct-n is the number of different n-grams over the number of tokens: the same denominator for all
/// n, as in the code of arXiv 2406.16235 (its section 3), so that a text of m tokens has at most
/// (m - 1)/m for n = 2. The continuations share one set, and no n-gram crosses from one to the next. Empty tokens
/// are left out first, as that code does with special tokens.
///
/// That code joins the tokens of an n-gram with `_`, by which `a_b c` and `a b_c` become one; here they are
/// two.
pub fn distinct<T: AsRef<str>>(continuations: &[Vec<T>]) -> Option<[f64; 3]> {
    // Tokens as numbers, so that an n-gram is three of them, `NONE` where it is shorter.
    const NONE: usize = usize::MAX;
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut sets: [HashSet<[usize; 3]>; 3] = Default::default();
    let mut n_tokens = 0;
    for tokens in continuations {
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
    fn distinct_is_that_worked_out_by_hand() {
        // "a b a" and "a b": 5 tokens; {a, b}; {ab, ba}; {aba}. So 2/5, 2/5, 1/5.
        assert_eq!(distinct(&[tokens("a b a"), tokens("a b")]), Some([0.4, 0.4, 0.2]));
    }

    #[test]
    fn no_n_gram_crosses_from_one_continuation_to_the_next() {
        // "a b" and "c d": 4 tokens, pairs ab and cd but not bc, no triple.
        assert_eq!(distinct(&[tokens("a b"), tokens("c d")]), Some([1.0, 0.5, 0.0]));
    }

    #[test]
    fn the_denominator_is_the_same_for_every_n() {
        // "a b c": 3 tokens, 3 unigrams, 2 pairs, 1 triple.
        assert_eq!(distinct(&[tokens("a b c")]), Some([1.0, 2.0 / 3.0, 1.0 / 3.0]));
    }

    #[test]
    fn empty_tokens_do_not_count() {
        assert_eq!(distinct(&[vec!["a", "", "b"]]), Some([1.0, 0.5, 0.0]));
        assert_eq!(distinct(&[vec![""], vec![]]), None);
        assert_eq!(distinct::<&str>(&[]), None);
    }

    #[test]
    fn tokens_that_hold_an_underscore_do_not_merge() {
        assert_eq!(distinct(&[vec!["a_b", "c"], vec!["a", "b_c"]]), Some([1.0, 0.5, 0.0]));
    }

    #[test]
    fn doubling_the_continuations_halves_distinct() {
        let once = distinct(&[tokens("a b c d")]).unwrap();
        let twice = distinct(&[tokens("a b c d"), tokens("a b c d")]).unwrap();
        for (once, twice) in once.iter().zip(twice) {
            assert!((once / 2.0 - twice).abs() < 1e-15);
        }
    }
}

//! The tokens that top-k, top-p and min-p keep, found without sorting the vocabulary.
//!
//! One pass puts each token's probability into a bin by how far its logit is below the best one. Each cut falls
//! into one bin, and only the tokens of those few bins are sorted. The time therefore hardly depends on how flat
//! the distribution is.

use std::cmp::Ordering;

use super::Sampling;
use super::softmax::{GROUP, LANES, Peaks, exp_of_nonpositive, sum_exp};

/// A token with its unnormalised probability, which is 1 for the most probable token.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
    weight: f32,
}

impl Candidate {
    /// Orders by descending probability. Ties go to the smaller id, so the result does not depend on the search.
    fn descending(a: &Candidate, b: &Candidate) -> Ordering {
        b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
    }
}

/// Number of bins. They have equal width and start at the best logit; the last takes everything further down.
const BINS: usize = 1024;
/// How far the bins reach below the best logit, in nats after the temperature. A token further down has less than
/// a ten-millionth of the best one's probability.
const REACH: f32 = 16.0;
const BINS_PER_NAT: f32 = (BINS - 1) as f32 / REACH;

/// The tokens that top-k, top-p and min-p keep: all of the first bins, and part of one more.
pub(super) struct Nucleus<'a> {
    logits: &'a [f32],
    peaks: &'a Peaks,
    scale: f32,
    /// Mass in each bin.
    mass: Box<[f64; BINS]>,
    /// Tokens in each bin; complete only if top-k needs it.
    count: Box<[u32; BINS]>,
    /// All tokens of the bins below this one are kept.
    whole: usize,
    /// The kept tokens of bin `whole`, most probable first.
    rest: Vec<Candidate>,
}

impl<'a> Nucleus<'a> {
    pub(super) fn new(logits: &'a [f32], peaks: &'a Peaks, sampling: &Sampling) -> Nucleus<'a> {
        let Sampling { temperature, top_k, top_p, min_p } = *sampling;
        let mut nucleus = Nucleus {
            logits,
            peaks,
            scale: 1.0 / temperature,
            mass: Box::new([0.0; BINS]),
            count: Box::new([0; BINS]),
            whole: BINS,
            rest: Vec::new(),
        };
        let cuts_count = top_k > 0 && (top_k as usize) < logits.len();
        nucleus.fill_bins(cuts_count);
        if cuts_count {
            nucleus.cut_count(top_k);
        }
        if top_p < 1.0 {
            nucleus.cut_mass(f64::from(top_p) * nucleus.total());
        }
        if min_p > 0.0 {
            nucleus.cut_weight(min_p);
        }
        nucleus
    }

    /// How far a logit is below the best one, in nats after the temperature.
    fn depth(&self, logit: f32) -> f32 {
        (self.peaks.top - logit) * self.scale
    }

    /// Fills in the mass of each bin, and its number of tokens if `counted`.
    fn fill_bins(&mut self, counted: bool) {
        let mut weights = [0.0f32; LANES];
        let mut bins = [0u32; LANES];
        let mut halves = Box::new([[0.0f64; BINS]; 2]);
        for (group, &peak) in self.logits.chunks(GROUP).zip(&self.peaks.of_groups) {
            if self.depth(peak) >= REACH {
                self.mass[BINS - 1] += sum_exp(group, self.peaks.top, self.scale);
                self.count[BINS - 1] += group.len() as u32;
                continue;
            }
            let (chunks, rest) = group.as_chunks::<LANES>();
            for chunk in chunks {
                // A plain loop over arrays, because `map` with closures was not vectorised.
                for i in 0..LANES {
                    let depth = self.depth(chunk[i]);
                    weights[i] = exp_of_nonpositive(-depth);
                    bins[i] = bin_of(depth);
                }
                // Two sums per bin: neighbours often fall into the same bin, and would wait for each other.
                for i in 0..LANES {
                    halves[i % 2][bins[i] as usize % BINS] += f64::from(weights[i]);
                }
                if counted {
                    bins.iter().for_each(|&bin| self.count[bin as usize % BINS] += 1);
                }
            }
            for &logit in rest {
                let depth = self.depth(logit);
                self.mass[bin_of(depth) as usize] += f64::from(exp_of_nonpositive(-depth));
                self.count[bin_of(depth) as usize] += 1;
            }
        }
        for half in halves.iter() {
            self.mass.iter_mut().zip(half).for_each(|(mass, half)| *mass += half);
        }
    }

    /// The tokens of one bin, in order of id.
    fn tokens_of(&self, bin: usize) -> Vec<Candidate> {
        let mut found = Vec::new();
        for ((i, group), &peak) in self.logits.chunks(GROUP).enumerate().zip(&self.peaks.of_groups) {
            // Skip the group if no token in it is probable enough, which holds for most groups.
            if bin_of(self.depth(peak)) > bin as u32 {
                continue;
            }
            for (j, chunk) in group.chunks(LANES).enumerate() {
                // Skip most chunks of the remaining groups, with one vector comparison each.
                if !chunk.iter().fold(false, |any, &l| any | (bin_of(self.depth(l)) == bin as u32)) {
                    continue;
                }
                for (l, &logit) in chunk.iter().enumerate() {
                    let depth = self.depth(logit);
                    if bin_of(depth) == bin as u32 {
                        let token = (i * GROUP + j * LANES + l) as u32;
                        found.push(Candidate { token, logit, weight: exp_of_nonpositive(-depth) });
                    }
                }
            }
        }
        found
    }

    /// Makes `bin` the last bin, which may be kept in part; returns its tokens, most probable first.
    fn open_last(&mut self, bin: usize) -> Vec<Candidate> {
        if bin == self.whole {
            return std::mem::take(&mut self.rest);
        }
        self.whole = bin;
        let mut tokens = self.tokens_of(bin);
        tokens.sort_unstable_by(Candidate::descending);
        tokens
    }

    /// Keeps the `n` most probable tokens.
    fn cut_count(&mut self, n: u32) {
        let mut left = n;
        for bin in 0..self.whole {
            if self.count[bin] >= left {
                self.rest = self.open_last(bin);
                self.rest.truncate(left as usize);
                return;
            }
            left -= self.count[bin];
        }
    }

    /// Keeps the smallest set of most probable tokens whose mass is at least `mass`.
    fn cut_mass(&mut self, mass: f64) {
        let mut left = mass;
        let mut bin = 0;
        while bin < self.whole && self.mass[bin] < left {
            left -= self.mass[bin];
            bin += 1;
        }
        // Only rounding can take the cut past the last bin. Keep everything then.
        if bin == BINS {
            return;
        }
        let mut tokens = self.open_last(bin);
        let n = tokens.iter().position(|c| {
            left -= f64::from(c.weight);
            left <= 0.0
        });
        tokens.truncate(n.map_or(tokens.len(), |n| n + 1));
        self.rest = tokens;
    }

    /// Keeps the tokens with at least this weight.
    fn cut_weight(&mut self, least: f32) {
        let bin = bin_of(-least.ln()) as usize;
        if bin <= self.whole && bin < BINS {
            self.rest = self.open_last(bin);
            self.rest.retain(|c| c.weight >= least);
        }
    }

    fn total(&self) -> f64 {
        self.mass[..self.whole].iter().sum::<f64>()
            + self.rest.iter().map(|c| f64::from(c.weight)).sum::<f64>()
    }

    /// Draws the token at `share` of the mass, with `share` in [0, 1).
    ///
    /// Bins are walked in order, and the tokens of a whole bin in order of id.
    pub(super) fn draw(&self, share: f64) -> Option<u32> {
        let mut left = share * self.total();
        // Rounding can leave a tiny remainder in `left`. It goes to the last bin with any mass.
        let mut chosen = None;
        for bin in 0..self.whole {
            if self.mass[bin] > 0.0 {
                chosen = Some(bin);
                if left < self.mass[bin] {
                    return token_at(&self.tokens_of(bin), left);
                }
                left -= self.mass[bin];
            }
        }
        match chosen {
            Some(bin) if self.rest.is_empty() => token_at(&self.tokens_of(bin), f64::INFINITY),
            _ => token_at(&self.rest, left),
        }
    }
}

/// The candidate at which `left` runs out, or the last one with any weight if it never does.
fn token_at(candidates: &[Candidate], mut left: f64) -> Option<u32> {
    let mut token = None;
    for candidate in candidates.iter().filter(|c| c.weight > 0.0) {
        token = Some(candidate.token);
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            break;
        }
    }
    token
}

/// The bin of a depth: its nearest bin, or the last one if it is deeper.
///
/// A conversion to an integer would not be vectorised; adding 2^23 leaves the integer in the low bits instead.
fn bin_of(depth: f32) -> u32 {
    const LAST: f32 = (BINS - 1) as f32;
    let bin = depth * BINS_PER_NAT;
    let bin = if bin < LAST { bin } else { LAST };
    (bin + 8_388_608.0).to_bits() & (BINS as u32 - 1)
}

#[cfg(test)]
mod tests {
    use super::super::tests::logits;
    use super::*;

    /// The kept tokens, in order of id.
    fn tokens(nucleus: &Nucleus<'_>) -> Vec<u32> {
        let mut tokens: Vec<u32> =
            (0..nucleus.whole).flat_map(|bin| nucleus.tokens_of(bin)).map(|c| c.token).collect();
        tokens.extend(nucleus.rest.iter().map(|c| c.token));
        tokens.sort_unstable();
        tokens
    }

    /// The reference: sorts the whole vocabulary, in f64.
    fn nucleus_by_sorting(logits: &[f32], s: &Sampling) -> Vec<u32> {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        if s.top_k > 0 {
            order.truncate(s.top_k as usize);
        }
        let top = f64::from(logits[order[0] as usize]);
        let weight = |t: u32| ((f64::from(logits[t as usize]) - top) / f64::from(s.temperature)).exp();
        let total: f64 = order.iter().map(|&t| weight(t)).sum();
        if s.top_p < 1.0 {
            let mut sum = 0.0;
            let n = order.iter().position(|&t| {
                sum += weight(t);
                sum >= f64::from(s.top_p) * total
            });
            order.truncate(n.map_or(order.len(), |n| n + 1));
        }
        order.retain(|&t| weight(t) >= f64::from(s.min_p));
        order.sort_unstable();
        order
    }

    #[test]
    fn the_nucleus_matches_a_full_sort_of_the_vocabulary() {
        let cases = [
            Sampling::PAPER,
            Sampling { top_k: 7, ..Sampling::PAPER },
            Sampling { top_k: 40, top_p: 1.0, ..Sampling::PAPER },
            Sampling { min_p: 0.05, ..Sampling::PAPER },
            Sampling { min_p: 0.01, top_p: 1.0, ..Sampling::PAPER },
            Sampling { temperature: 3.0, top_p: 0.99, ..Sampling::PAPER },
            Sampling { temperature: 0.05, top_p: 0.5, ..Sampling::PAPER },
            Sampling { temperature: 50.0, top_k: 900, ..Sampling::PAPER },
        ];
        for (i, sampling) in cases.iter().enumerate() {
            for seed in 0..20 {
                let row = logits(1000 + 17 * seed as usize, seed);
                let found = tokens(&Nucleus::new(&row, &Peaks::of(&row).unwrap(), sampling));
                assert_eq!(found, nucleus_by_sorting(&row, sampling), "case {i}, seed {seed}");
            }
        }
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses_the_threshold() {
        // Probabilities 0.5, 0.3, 0.15, 0.05: two tokens reach 0.79, and 0.81 needs the third.
        let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let kept = |top_p| {
            let sampling = Sampling { temperature: 1.0, top_p, ..Sampling::PAPER };
            tokens(&Nucleus::new(&row, &Peaks::of(&row).unwrap(), &sampling)).len()
        };
        assert_eq!(kept(0.79), 2);
        assert_eq!(kept(0.81), 3);
        assert_eq!(kept(0.5), 1);
    }
}

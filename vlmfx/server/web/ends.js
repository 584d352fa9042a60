// Keeps an element scrolled to its end while it grows or shrinks, unless somebody has scrolled up.

export function keptAtEnd(element) {
  let isAtEnd = true;
  let last = 0;
  const follow = () => {
    if (isAtEnd) element.scrollTop = element.scrollHeight;
  };
  element.addEventListener("scroll", () => {
    const rest = element.scrollHeight - element.scrollTop - element.clientHeight;
    if (rest < 40) isAtEnd = true;
    else if (element.scrollTop < last) isAtEnd = false; // and not where it has grown since
    last = element.scrollTop;
  });
  element.addEventListener("load", follow, true); // of pictures in it
  new ResizeObserver(follow).observe(element);
  const jump = () => {
    isAtEnd = true;
    follow();
  };
  return { follow, jump };
}

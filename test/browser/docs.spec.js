// Tests the API reference, in light and dark mode.
import {expect, test} from './page.js'

// faint returns texts that are hard to read, because their contrast with the background is
// below 3. It runs in the page.
function faint() {
	const parse = color => color.match(/[\d.]+/g).map(Number)
	const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a))
	const light = rgb => rgb.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
		.reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
	const behind = element => {
		const color = parse(getComputedStyle(element).backgroundColor)
		if (color[3] === undefined || !element.parentElement) return color.slice(0, 3)
		return over(color, behind(element.parentElement))
	}
	const found = new Set()
	const walker = document.createTreeWalker(document.getElementById('docs'), NodeFilter.SHOW_TEXT)
	while (walker.nextNode()) {
		const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim()
		if (!text || element.closest('style') || !element.checkVisibility({checkVisibilityCSS: true, checkOpacity: true})) continue
		const below = behind(element), above = over(parse(getComputedStyle(element).color), below)
		const [high, low] = [light(above), light(below)].sort((a, b) => b - a)
		const ratio = (high + 0.05) / (low + 0.05)
		if (ratio < 3) found.add(`${element.tagName} ${element.className} ${text.slice(0, 20)}: ${ratio.toFixed(1)}`)
	}
	return [...found].slice(0, 20)
}

for (const colorScheme of ['light', 'dark']) {
	test(`the API reference is readable in ${colorScheme} mode and loads nothing else`, async ({page, baseURL}) => {
		await page.emulateMedia({colorScheme})
		const asked = []
		page.on('request', request => asked.push(request.url()))
		const answer = await page.goto('/docs')
		expect(answer.headers()['content-security-policy']).toContain("default-src 'none'")
		await expect(page.getByRole('heading', {name: 'Create a sandbox'})).toBeVisible()
		await expect(page.getByText('/v1/sandboxes/{sandbox_id}/exec/stream').first()).toBeAttached()
		await expect(page.getByText('on_timeout').first()).toBeAttached()

		// The search runs in a worker.
		await page.getByRole('textbox').fill('idempotency')
		await expect(page.getByRole('menuitem').filter({hasText: /sandbox/i}).first()).toBeVisible()
		await page.getByRole('textbox').fill('')

		const shade = await page.evaluate(() => getComputedStyle(document.body).backgroundColor)
		const [red] = shade.match(/\d+/g).map(Number)
		expect(red < 64).toBe(colorScheme === 'dark')
		expect(await page.evaluate(faint)).toEqual([])
		expect(asked.filter(url => !/^(data|blob):/.test(url))).toEqual([baseURL + '/docs'])
		await page.goto('/docs#operation/createSandbox')
		await expect(page.getByRole('heading', {name: 'Create a sandbox'})).toBeInViewport()
		await page.screenshot({path: test.info().outputPath(colorScheme + '.png')})
	})
}
